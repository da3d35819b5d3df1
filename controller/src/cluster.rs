//! The way to the API server: which one, as whom, and in which namespace our Lease lies.

use berth_api::{SCHEMA, keys};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ObjectMeta, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};

use crate::cli::{Fatal, Options};

/// Where a service account's pod finds its own namespace.
const POD_NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";
/// Namespace of the Lease where nothing else says one.
const DEFAULT_NAMESPACE: &str = "berth-system";

/// The API server, and the namespace that the kubeconfig's context names.
pub(crate) struct Cluster {
    pub client: Client,
    context_namespace: Option<String>,
}

/// Finds the API server: the flag's or variable's kubeconfig, else the service account, else ~/.kube/config.
pub(crate) async fn connect(options: &Options) -> Result<Cluster, Fatal> {
    let given = options.kubeconfig.as_deref().filter(|path| !path.is_empty());
    let (mut config, context_namespace) = match given {
        None => match Config::incluster() {
            Ok(config) => (config, None),
            Err(_) => {
                let kubeconfig = Kubeconfig::read().map_err(|e| {
                    Fatal::new(
                        "find the API server (no --kubeconfig, not in a pod, no ~/.kube/config)",
                        e,
                    )
                })?;
                from_kubeconfig(kubeconfig, "~/.kube/config").await?
            }
        },
        Some(path) => from_kubeconfig(read(path)?, path).await?,
    };
    let agent = concat!("berth/", env!("CARGO_PKG_VERSION"));
    if let (Ok(name), Ok(value)) = ("user-agent".parse(), agent.parse()) {
        config.headers.push((name, value));
    }
    let client = Client::try_from(config).map_err(|e| Fatal::new("prepare the connection to the API server", e))?;
    Ok(Cluster {
        client,
        context_namespace,
    })
}

/// Reads one file, or several separated by colons as kubectl does.
fn read(paths: &str) -> Result<Kubeconfig, Fatal> {
    let failed = |path: &str, e| Fatal::new(&format!("read kubeconfig {path}"), e);
    let mut merged: Option<Kubeconfig> = None;
    for path in paths.split(':').filter(|p| !p.is_empty()) {
        let next = Kubeconfig::read_from(path).map_err(|e| failed(path, e))?;
        merged = Some(match merged {
            None => next,
            Some(first) => first.merge(next).map_err(|e| failed(path, e))?,
        });
    }
    merged.ok_or_else(|| Fatal("read kubeconfig: no file is named".to_owned()))
}

async fn from_kubeconfig(kubeconfig: Kubeconfig, path: &str) -> Result<(Config, Option<String>), Fatal> {
    let current = kubeconfig.current_context.as_deref();
    let context = kubeconfig.contexts.iter().find(|c| Some(c.name.as_str()) == current);
    let namespace = context
        .and_then(|c| c.context.as_ref())
        .and_then(|c| c.namespace.clone());
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    let config = config.map_err(|e| Fatal::new(&format!("use kubeconfig {path}"), e))?;
    Ok((config, namespace.filter(|n| !n.is_empty())))
}

/// Where the Lease lies: the flag's namespace, else the pod's, else the context's, else a namespace of our own.
pub(crate) async fn lease_namespace(cluster: &Cluster, options: &Options) -> String {
    let pod = || std::env::var("POD_NAMESPACE").ok().filter(|n| !n.is_empty());
    let mounted = || {
        let text = std::fs::read_to_string(POD_NAMESPACE).ok()?;
        Some(text.trim().to_owned()).filter(|n| !n.is_empty())
    };
    let known = options
        .lease_namespace
        .clone()
        .filter(|n| !n.is_empty())
        .or_else(pod)
        .or_else(mounted)
        .or_else(|| cluster.context_namespace.clone());
    match known {
        Some(namespace) => namespace,
        None => own_namespace(&cluster.client).await,
    }
}

async fn own_namespace(client: &Client) -> String {
    let api: Api<Namespace> = Api::all(client.clone());
    let namespace = Namespace {
        metadata: ObjectMeta {
            name: Some(DEFAULT_NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        ..Namespace::default()
    };
    match api.create(&PostParams::default(), &namespace).await {
        Ok(_) => DEFAULT_NAMESPACE.to_owned(),
        Err(kube::Error::Api(status)) if status.is_already_exists() => DEFAULT_NAMESPACE.to_owned(),
        Err(error) => {
            tracing::warn!(%error, "namespace {DEFAULT_NAMESPACE} cannot be created; the lease goes into default");
            "default".to_owned()
        }
    }
}

/// Who we are in the Lease: the pod or host, and something that a restart changes.
pub(crate) fn identity() -> String {
    let host = || {
        let text = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
        Some(text.trim().to_owned()).filter(|n| !n.is_empty())
    };
    let name = std::env::var("POD_NAME").ok().filter(|n| !n.is_empty()).or_else(host);
    format!("{}_{:08x}", name.as_deref().unwrap_or("berth"), rand::random::<u32>())
}

/// Whether the installed definitions are at least as new as this program, and if not, what to do.
pub(crate) async fn check_schema(client: &Client) -> Result<(), String> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in berth_api::crds() {
        let Some(name) = crd.metadata.name else { continue };
        let found = match api.get_metadata_opt(&name).await {
            Ok(found) => found,
            // without the right to read definitions they are taken for good
            Err(kube::Error::Api(status)) if status.is_forbidden() => return Ok(()),
            Err(error) => return Err(format!("read definition {name}: {error}")),
        };
        let Some(found) = found else {
            return Err(format!(
                "the definition {name} is not installed: berth crds | kubectl apply --server-side -f -"
            ));
        };
        let number = found.metadata.annotations.as_ref().and_then(|a| a.get(keys::SCHEMA));
        let number = number.and_then(|n| n.parse::<i64>().ok()).unwrap_or(0);
        if number < SCHEMA {
            return Err(format!(
                "the installed definition {name} is older ({number}) than this program ({SCHEMA}): berth crds | kubectl apply --server-side -f -"
            ));
        }
    }
    Ok(())
}
