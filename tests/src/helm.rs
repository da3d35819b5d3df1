//! Helm, and the controller as a chart would run it: no pods run here, so its container is a process with the rendered
//! arguments and environment, under a token of the rendered service account.

use std::path::PathBuf;

use serde_json::{Value, json};
use tokio::process::Command;

use crate::{ControllerOptions, Kubectl, Test, shared};

/// The helm program of the cache folder, else the one of `$PATH`; or what to do about it.
pub fn helm_program() -> Result<PathBuf, String> {
    let script = shared::root().join("tests/kubernetes/control-plane.sh");
    let say = |what: &str| {
        let output = std::process::Command::new(&script).arg(what).output();
        let output = output.map_err(|error| format!("{} cannot be run: {error}", script.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if output.status.success() { Ok(text) } else { Err(text) }
    };
    let built = PathBuf::from(say("programs")?).join("helm");
    if built.exists() {
        return Ok(built);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join("helm"));
    match found.find(|path| path.exists()) {
        Some(path) => Ok(path),
        None => Err(say("check-tools")
            .err()
            .unwrap_or_else(|| "there is no helm".to_owned())),
    }
}

/// The objects of a YAML text with any number of documents.
pub fn objects_of(text: &str) -> Vec<Value> {
    let documents = text.split("\n---").map(|document| {
        let value: Value = serde_yaml::from_str(document).unwrap_or_else(|error| panic!("{error}:\n{document}"));
        value
    });
    documents.filter(|document| !document.is_null()).collect()
}

/// The only object of a kind.
pub fn one_of_kind<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let mut found = objects.iter().filter(|object| object["kind"] == kind);
    match (found.next(), found.next()) {
        (Some(object), None) => object,
        (first, _) => panic!(
            "{} objects of kind {kind}",
            if first.is_some() { "several" } else { "no" }
        ),
    }
}

impl Test {
    /// Runs helm as cluster admin, with its caches in this test's folder; what it printed, or its errors.
    pub async fn helm(&self, args: &[&str]) -> Kubectl {
        let mut command = Command::new(helm_program()?);
        command.args(args).env("KUBECONFIG", self.kube().kubeconfig());
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, self.dir().join(variable));
        }
        shared::run(command).await
    }

    /// How the one Deployment among these objects runs the controller. `/scratch` is a folder of this test.
    pub async fn as_rendered(&self, objects: &[Value], namespace: &str) -> ControllerOptions {
        let deployment = one_of_kind(objects, "Deployment");
        let pod = &deployment["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let scratch = self.dir().join("scratch");
        std::fs::create_dir_all(&scratch).unwrap_or_else(|error| panic!("{}: {error}", scratch.display()));
        let args = container["args"].as_array().into_iter().flatten();
        let args = args
            .filter_map(Value::as_str)
            .filter(|arg| !arg.starts_with("--listen-address="));
        let args = args.map(|arg| arg.replace("=/scratch", &format!("={}", scratch.display())));
        let env = container["env"].as_array().into_iter().flatten().map(|variable| {
            let field = variable["valueFrom"]["fieldRef"]["fieldPath"].as_str();
            let value = match field {
                Some("metadata.namespace") => namespace.to_owned(),
                Some("metadata.name") => self.unique("pod"),
                Some(other) => panic!("the pod's {other} is not known here"),
                None => variable["value"].as_str().unwrap_or_default().to_owned(),
            };
            (variable["name"].as_str().unwrap_or_default().to_owned(), value)
        });
        let account = pod["serviceAccountName"].as_str().unwrap_or_default();
        ControllerOptions {
            command: Some(args.collect()),
            env: env.collect(),
            kubeconfig: Some(self.kubeconfig_of(account, namespace).await),
            ..ControllerOptions::default()
        }
    }

    /// A kubeconfig that logs in as a service account, by a token of it.
    pub async fn kubeconfig_of(&self, account: &str, namespace: &str) -> PathBuf {
        let args = ["create", "token", account, "-n", namespace];
        let token = self.kube().kubectl(&args).await.expect("the account gets a token");
        let text = std::fs::read_to_string(self.kube().kubeconfig()).expect("the admin's kubeconfig can be read");
        let mut config: Value = serde_yaml::from_str(&text).expect("it is YAML");
        config["users"][0]["user"] = json!({"token": token.trim()});
        let path = self.dir().join(format!("kubeconfig-{account}"));
        std::fs::write(&path, config.to_string()).expect("a kubeconfig can be written");
        path
    }
}
