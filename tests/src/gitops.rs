//! Real Flux and Argo CD beside the control plane, Git repositories that they read, and the manifests of `examples/`.

use std::path::{Path, PathBuf};

use kube::Api;
use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind};
use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::kube::Kube;
use crate::{Test, shared};

static FLUX: OnceCell<GitOps> = OnceCell::const_new();
static ARGO: OnceCell<GitOps> = OnceCell::const_new();

/// Which of the two.
#[derive(Clone, Copy)]
pub(crate) enum Tool {
    Flux,
    Argo,
}

impl Tool {
    fn script(self) -> PathBuf {
        let name = match self {
            Tool::Flux => "flux.sh",
            Tool::Argo => "argo.sh",
        };
        shared::root().join("tests/gitops").join(name)
    }

    pub(crate) fn what_is_missing(self) -> Option<String> {
        match std::process::Command::new(self.script()).arg("check").output() {
            Ok(out) if out.status.success() => None,
            Ok(out) => Some(String::from_utf8_lossy(&out.stdout).trim().to_owned()),
            Err(error) => Some(format!("{} cannot be run: {error}", self.script().display())),
        }
    }

    /// The one of this process; it ends with it.
    pub(crate) async fn shared(self) -> &'static GitOps {
        let cell = match self {
            Tool::Flux => &FLUX,
            Tool::Argo => &ARGO,
        };
        cell.get_or_init(|| GitOps::start(self)).await
    }
}

/// Flux or Argo CD as processes, and the Git server that it reads.
pub struct GitOps {
    dir: PathBuf,
}

impl GitOps {
    async fn start(tool: Tool) -> GitOps {
        let (name, variable) = match tool {
            Tool::Flux => ("flux", "FLUX_DIR"),
            Tool::Argo => ("argo", "ARGO_DIR"),
        };
        let dir = shared::work_dir().join(format!("{name}-{}", std::process::id()));
        let kubeconfig = Kube::shared().await.kubeconfig();
        let env = [
            (variable, dir.display().to_string()),
            ("KUBECONFIG", kubeconfig.display().to_string()),
        ];
        shared::end_with_this_process(&tool.script(), &env, None)
            .unwrap_or_else(|error| panic!("cannot provide for the end of {name}: {error}"));
        let mut command = Command::new(tool.script());
        command.arg("up").envs(env);
        shared::run(command)
            .await
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        GitOps { dir }
    }

    /// A new, empty repository on the Git server.
    pub async fn repository(&self, name: &str) -> Repository {
        let bare = self.dir.join("git").join(format!("{name}.git"));
        let work = self.dir.join("work").join(name);
        let repository = Repository {
            url: format!("{}/{name}.git", read(&self.dir.join("git.url"))),
            work,
        };
        for folder in [&bare, &repository.work] {
            std::fs::create_dir_all(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        }
        let bare = bare.display().to_string();
        repository.git(&["init", "-q", "--bare", "-b", "main", &bare]).await;
        repository.git(&["init", "-q", "-b", "main"]).await;
        repository.git(&["remote", "add", "origin", &bare]).await;
        repository
    }
}

fn read(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.trim().to_owned()
}

/// A Git repository with a clone to work in.
pub struct Repository {
    url: String,
    work: PathBuf,
}

impl Repository {
    async fn git(&self, args: &[&str]) -> String {
        let mut command = Command::new("git");
        command
            .arg("-C")
            .arg(&self.work)
            .args(args)
            // the settings of whoever runs the tests are not looked at
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1");
        for (who, mail) in [
            ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL"),
            ("GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"),
        ] {
            command.env(who, "Platform team").env(mail, "platform@example.com");
        }
        shared::run(command).await.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Where Flux and Argo CD fetch it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Writes files (an empty text deletes one), commits and pushes them; the commit's id.
    pub async fn commit(&self, message: &str, files: &[(&str, &str)]) -> String {
        for (name, text) in files {
            let path = self.work.join(name);
            let done = if text.is_empty() {
                std::fs::remove_file(&path)
            } else {
                std::fs::create_dir_all(path.parent().unwrap_or(&self.work)).and_then(|()| std::fs::write(&path, text))
            };
            done.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        self.git(&["add", "--all"]).await;
        self.git(&["commit", "-q", "-m", message]).await;
        self.push().await
    }

    /// Takes the newest commit back with another one, as `git revert` does.
    pub async fn revert(&self) -> String {
        self.git(&["revert", "--no-edit", "HEAD"]).await;
        self.push().await
    }

    async fn push(&self) -> String {
        self.git(&["push", "-q", "origin", "main"]).await;
        self.head().await
    }

    /// The newest commit's id.
    pub async fn head(&self) -> String {
        self.git(&["rev-parse", "HEAD"]).await.trim().to_owned()
    }
}

/// A manifest of `examples/` with some of its texts replaced by others; each must be there.
pub fn example(path: &str, replaced: &[(&str, &str)]) -> String {
    let mut text = read(&shared::root().join("examples").join(path));
    for (from, to) in replaced {
        assert!(text.contains(from), "examples/{path} has no {from:?}");
        text = text.replace(from, to);
    }
    text + "\n"
}

impl Kube {
    /// Objects of any kind, e.g. `("kustomize.toolkit.fluxcd.io/v1", "Kustomization", "shop")`.
    pub fn any(&self, api_version: &str, kind: &str, namespace: &str) -> Api<DynamicObject> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        Api::namespaced_with(self.client(), namespace, &resource)
    }

    /// Argo CD forgets the applications of a test's namespace, which bear its name; their objects stay.
    pub(crate) async fn delete_applications(&self, namespace: &str) {
        let api = self.any("argoproj.io/v1alpha1", "Application", "argocd");
        let _ = api.delete(namespace, &kube::api::DeleteParams::default()).await;
    }
}

impl Test {
    /// Flux. The suite must name [`Needs::Flux`](crate::Needs::Flux).
    pub async fn flux(&self) -> &'static GitOps {
        Tool::Flux.shared().await
    }

    /// Argo CD. The suite must name [`Needs::Argo`](crate::Needs::Argo).
    pub async fn argo(&self) -> &'static GitOps {
        Tool::Argo.shared().await
    }
}

/// Runs `argo.sh lua ARGS`: health checks and actions in Argo CD's own Lua engine.
pub async fn argo_lua(args: &[&str], input: &str) -> Result<String, String> {
    use tokio::io::AsyncWriteExt;
    let mut command = Command::new(Tool::Argo.script());
    command
        .arg("lua")
        .args(args)
        .current_dir(shared::root())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.to_owned();
        // both ends must be served at the same time
        tokio::spawn(async move { stdin.write_all(input.as_bytes()).await });
    }
    let out = child.wait_with_output().await.map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        Ok(said)
    } else {
        Err(said + &String::from_utf8_lossy(&out.stderr))
    }
}
