//! `berth crds`: the CustomResourceDefinitions as YAML, the same text as in the folder `crds/`.

use std::io::Write;
use std::path::Path;

use crate::cli::Fatal;

fn texts() -> Result<Vec<(String, String)>, Fatal> {
    let text = |crd: &_| serde_yaml::to_string(crd).map_err(|e| Fatal::new("write a definition as YAML", e));
    berth_api::crds()
        .iter()
        .map(|crd| Ok((format!("{}.yaml", crd.spec.names.plural), text(crd)?)))
        .collect()
}

/// All definitions, one document each.
pub(crate) fn print(out: &mut dyn Write) -> Result<(), Fatal> {
    for (_, text) in texts()? {
        writeln!(out, "---\n{}", text.trim_end()).map_err(|e| Fatal::new("print the definitions", e))?;
    }
    Ok(())
}

/// One file per kind.
pub(crate) fn write(dir: &Path) -> Result<(), Fatal> {
    let failed = |path: &Path, e| Fatal::new(&format!("write {}", path.display()), e);
    std::fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
    for (name, text) in texts()? {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|e| failed(&path, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_definitions_are_four_documents() {
        let mut out = Vec::new();
        print(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().filter(|l| *l == "---").count(), 4);
        assert_eq!(text.matches("\nkind: CustomResourceDefinition").count(), 4);
    }
}
