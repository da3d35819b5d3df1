//! The scripts for Argo CD lie in the folders that the Argo CD project takes contributions in. `argocd-cm.yaml` is made from them, for
//! everybody who does not want to wait for such a contribution.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::{Result, generated, only, root};

const FOLDER: &str = "charts/berth/argocd";
const HEAD: &str = "\
# Health checks and actions of Berth's kinds for Argo CD, made from the scripts beside this file. They are settings of Argo CD's own:
#   kubectl apply --server-side --field-manager=berth -n argocd -f argocd-cm.yaml
# adds them to its ConfigMap; where a Helm chart or GitOps keeps that one, put `data` there (the chart argo-cd calls it configs.cm).
apiVersion: v1
kind: ConfigMap
metadata:
  name: argocd-cm
  labels:
    app.kubernetes.io/name: argocd-cm
    app.kubernetes.io/part-of: argocd
data:
";

fn scripts() -> PathBuf {
    root().join(FOLDER).join("resource_customizations/berth.dev")
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = std::fs::read_dir(folder)?
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names)
}

/// A file as a block of YAML.
fn block(into: &mut String, path: &Path, indent: usize) -> Result {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    for line in text.lines() {
        let space = if line.is_empty() { 0 } else { indent };
        writeln!(into, "{:space$}{line}", "")?;
    }
    Ok(())
}

fn config_map() -> Result<String> {
    let mut text = HEAD.to_owned();
    for kind in names(&scripts())? {
        let folder = scripts().join(&kind);
        writeln!(text, "  resource.customizations.health.berth.dev_{kind}: |")?;
        block(&mut text, &folder.join("health.lua"), 4)?;
        writeln!(
            text,
            "  resource.customizations.actions.berth.dev_{kind}: |\n    discovery.lua: |"
        )?;
        block(&mut text, &folder.join("actions/discovery.lua"), 6)?;
        writeln!(text, "    definitions:")?;
        for action in names(&folder.join("actions"))?
            .iter()
            .filter(|name| *name != "testdata")
        {
            writeln!(text, "    - name: {action}\n      action.lua: |")?;
            block(&mut text, &folder.join(format!("actions/{action}/action.lua")), 8)?;
        }
    }
    Ok(text)
}

#[test]
fn the_settings_for_argo_cd_are_made_from_the_scripts_of_every_kind() -> Result {
    let mut kinds: Vec<String> = berth_api::crds().into_iter().map(|crd| crd.spec.names.kind).collect();
    kinds.sort();
    assert_eq!(names(&scripts())?, kinds, "every kind has its health and its actions");
    generated(&format!("{FOLDER}/argocd-cm.yaml"), &config_map()?)?;
    for kind in kinds {
        let folder = scripts().join(&kind);
        let discovery = std::fs::read_to_string(folder.join("actions/discovery.lua"))?;
        for action in names(&folder.join("actions"))?
            .iter()
            .filter(|name| *name != "testdata")
        {
            assert!(
                discovery.contains(&format!("actions[\"{action}\"]")),
                "{kind}: discovery.lua does not offer {action}"
            );
        }
    }
    only(
        FOLDER,
        ["README.md", "argocd-cm.yaml", "resource_customizations"]
            .map(str::to_owned)
            .into(),
    )
}
