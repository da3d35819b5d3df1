//! The control plane of a test run, and what tests ask it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DynamicObject, ListParams, ObjectMeta, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, Config};
use serde::Deserialize;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::{shared, wait_for};

static SHARED: OnceCell<Kube> = OnceCell::const_new();

/// A running control plane, usually with the project's CRDs.
pub struct Kube {
    dir: PathBuf,
    programs: PathBuf,
    client: Client,
}

/// What `kubectl` answered.
pub type Kubectl = Result<String, String>;

/// A request as the API server's audit log tells it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditEvent {
    /// get, list, watch, create, update, patch, delete, deletecollection.
    pub verb: String,
    /// Who asked.
    pub user: User,
    /// Path and query.
    #[serde(rename = "requestURI")]
    pub request_uri: String,
    /// `User-Agent` of the writer.
    #[serde(default)]
    pub user_agent: String,
    /// When the API server got it, RFC 3339.
    #[serde(default, rename = "requestReceivedTimestamp")]
    pub received: String,
    /// What it was about.
    #[serde(default)]
    pub object_ref: ObjectRef,
    /// The answer.
    #[serde(default)]
    pub response_status: ResponseStatus,
    /// Among others why it was allowed.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// Who sent the request of an [`AuditEvent`].
#[derive(Clone, Debug, Deserialize)]
pub struct User {
    /// e.g. `system:serviceaccount:shop:berth`.
    pub username: String,
}

/// How the request of an [`AuditEvent`] was answered.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ResponseStatus {
    /// As in HTTP.
    #[serde(default)]
    pub code: u16,
}

/// The object of an [`AuditEvent`].
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ObjectRef {
    /// Empty for the core group.
    #[serde(default, rename = "apiGroup")]
    pub group: String,
    /// Plural, e.g. `leases`.
    #[serde(default)]
    pub resource: String,
    /// Namespace, empty for cluster-wide objects.
    #[serde(default)]
    pub namespace: String,
    /// Name, empty where the server made it up.
    #[serde(default)]
    pub name: String,
    /// e.g. `status`.
    #[serde(default)]
    pub subresource: String,
}

fn script() -> PathBuf {
    shared::root().join("tests/kubernetes/control-plane.sh")
}

impl Kube {
    pub(crate) fn what_is_missing() -> Option<String> {
        let out = std::process::Command::new(script()).arg("check").output();
        match out {
            Ok(out) if out.status.success() => None,
            Ok(out) => Some(String::from_utf8_lossy(&out.stdout).trim().to_owned()),
            Err(error) => Some(format!("tests/kubernetes/control-plane.sh cannot be run: {error}")),
        }
    }

    /// The control plane of this run: the one in `BERTH_KUBE_DIR`, or one that ends with this process.
    pub async fn shared() -> &'static Kube {
        SHARED
            .get_or_init(|| async {
                let dir = match std::env::var_os("BERTH_KUBE_DIR") {
                    Some(dir) => PathBuf::from(dir),
                    None => Kube::start_own().await,
                };
                let kube = Kube::in_dir(dir).await;
                kube.install_crds().await;
                kube
            })
            .await
    }

    /// One that ends with this process and has no CRDs yet.
    pub(crate) async fn bare() -> &'static Kube {
        SHARED
            .get_or_init(|| async { Kube::in_dir(Kube::start_own().await).await })
            .await
    }

    async fn in_dir(dir: PathBuf) -> Kube {
        // an error means that somebody in this process has chosen already, and all choose the same
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let programs = std::process::Command::new(script()).arg("programs").output();
        let programs = programs.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
        let programs = PathBuf::from(programs.unwrap_or_else(|error| panic!("cannot run {:?}: {error}", script())));
        let client = client_of(&dir.join("kubeconfig")).await;
        Kube { dir, programs, client }
    }

    async fn start_own() -> PathBuf {
        let dir = shared::work_dir().join(format!("kube-{}", std::process::id()));
        let env = [("KUBE_DIR", dir.display().to_string())];
        shared::end_with_this_process(&script(), &env, None)
            .unwrap_or_else(|error| panic!("cannot provide for the control plane's end: {error}"));
        let mut command = Command::new(script());
        command.arg("up").envs(env);
        shared::run(command)
            .await
            .unwrap_or_else(|error| panic!("the control plane does not start: {error}"));
        dir
    }

    async fn install_crds(&self) {
        let crds = shared::root().join("crds");
        let any = std::fs::read_dir(&crds).is_ok_and(|mut files| files.any(|file| file.is_ok()));
        if !any {
            return;
        }
        let crds = crds.display().to_string();
        for args in [
            &["apply", "--server-side", "--force-conflicts", "-f", &crds][..],
            &["wait", "--for=condition=established", "--timeout=30s", "-f", &crds],
        ] {
            self.kubectl(args)
                .await
                .unwrap_or_else(|error| panic!("the CRDs are not accepted: {error}"));
        }
    }

    /// Path of the cluster admin's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// Folder of `kubectl` and the servers, and of `helm` and `kubeconform` where they were built.
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// The cluster admin's client.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Runs `kubectl` as cluster admin; its output, or its error.
    pub async fn kubectl(&self, args: &[&str]) -> Kubectl {
        self.kubectl_with_input(args, "").await
    }

    /// Runs `kubectl` with something on its standard input, as for `apply -f -`.
    pub async fn kubectl_with_input(&self, args: &[&str], input: &str) -> Kubectl {
        let child = Command::new(self.programs.join("kubectl"))
            .args(args)
            .env("KUBECONFIG", self.kubeconfig())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let mut child = child.map_err(|error| format!("cannot start kubectl: {error}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // kubectl may end before it has read everything; its status tells more than the broken pipe
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        let out = child
            .wait_with_output()
            .await
            .map_err(|error| format!("kubectl: {error}"))?;
        if out.status.success() {
            Ok(String::from_utf8_lossy(&out.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&out.stderr).trim().to_owned())
        }
    }

    /// One of the project's kinds as untyped objects, e.g. `InstanceMove`.
    pub fn api(&self, kind: &str, namespace: &str) -> Api<DynamicObject> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("berth.dev", "v1alpha1", kind));
        Api::namespaced_with(self.client(), namespace, &resource)
    }

    pub(crate) async fn create_namespace(&self, name: &str) {
        let namespaces: Api<Namespace> = Api::all(self.client());
        let metadata = ObjectMeta {
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        };
        let namespace = Namespace {
            metadata,
            ..Namespace::default()
        };
        let made = namespaces.create(&PostParams::default(), &namespace).await;
        made.unwrap_or_else(|error| panic!("cannot create namespace {name}: {error}"));
    }

    /// Lets the objects go without the controller's consent and deletes the namespace, without waiting for its end.
    pub(crate) async fn delete_namespace(&self, name: &str) {
        for kind in ["InstanceMove", "InstancePlacement", "InstanceCopy", "InstanceServer"] {
            let api = self.api(kind, name);
            let Ok(objects) = api.list(&ListParams::default()).await else {
                continue;
            };
            for object in objects
                .items
                .iter()
                .filter(|object| object.metadata.finalizers.is_some())
            {
                let patch = kube::api::Patch::Merge(serde_json::json!({"metadata": {"finalizers": null}}));
                let name = object.metadata.name.as_deref().unwrap_or_default();
                let _ = api.patch(name, &kube::api::PatchParams::default(), &patch).await;
            }
        }
        let namespaces: Api<Namespace> = Api::all(self.client());
        let _ = namespaces.delete(name, &kube::api::DeleteParams::background()).await;
    }

    /// All of the project's objects and the events of a namespace as YAML.
    pub async fn dump(&self, namespace: &str) -> String {
        let objects = self
            .kubectl(&["get", "berth,events", "-n", namespace, "-o", "yaml"])
            .await;
        objects.unwrap_or_else(|error| error)
    }

    /// All writes the API server has seen so far.
    pub fn writes(&self) -> Vec<AuditEvent> {
        let mut requests = self.requests();
        requests.retain(|request| !["get", "list", "watch"].contains(&request.verb.as_str()));
        requests
    }

    /// All requests of a service account so far.
    pub fn requests_of(&self, account: &str, namespace: &str) -> Vec<AuditEvent> {
        let user = format!("system:serviceaccount:{namespace}:{account}");
        let mut requests = self.requests();
        requests.retain(|request| request.user.username == user);
        requests
    }

    fn requests(&self) -> Vec<AuditEvent> {
        let log = std::fs::read_to_string(self.dir.join("audit.log")).unwrap_or_default();
        // the last line may be half written
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Kills the API server (SIGKILL). Use it only in tests that run alone.
    pub async fn kill_apiserver(&self) {
        self.control("kill-apiserver").await;
    }

    /// Starts the API server again and waits until it is ready.
    pub async fn start_apiserver(&self) {
        self.control("start-apiserver").await;
        let client = self.client();
        wait_for("the API server to answer", Duration::from_secs(60), || {
            let client = client.clone();
            async move { client.apiserver_version().await.map_err(|error| error.to_string()) }
        })
        .await;
    }

    async fn control(&self, what: &str) {
        let mut command = Command::new(script());
        command.arg(what).env("KUBE_DIR", &self.dir);
        shared::run(command)
            .await
            .unwrap_or_else(|error| panic!("control-plane.sh {what}: {error}"));
    }
}

async fn client_of(path: &Path) -> Client {
    let config = Kubeconfig::read_from(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await;
    let config = config.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Client::try_from(config).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
