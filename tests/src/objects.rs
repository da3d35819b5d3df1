//! The project's objects as a user writes and reads them: YAML in, JSON out.

use std::time::Duration;

use kube::Api;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::{Server, Test, wait_for};

/// What [`Test::place`] writes; start from [`Placement::new`].
#[derive(Clone, Debug)]
pub struct Placement {
    name: String,
    spec: Value,
}

impl Placement {
    /// The instance of the placement's own name shall be on `server`.
    pub fn new(name: &str, server: &str) -> Placement {
        Placement {
            name: name.to_owned(),
            spec: json!({"target": {"server": server}}),
        }
    }

    /// Merges into `spec`, e.g. `{"powerState": "Running"}`.
    pub fn with(mut self, spec: Value) -> Placement {
        merge(&mut self.spec, spec);
        self
    }
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// A condition of an object.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    object["status"]["conditions"]
        .as_array()?
        .iter()
        .find(|condition| condition["type"] == kind)
}

/// `True/InPlace` and the like: status and reason of `Ready`; empty if there is none.
pub fn reason(object: &Value) -> String {
    condition(object, "Ready")
        .map(|c| format!("{}/{}", text(c, "status"), text(c, "reason")))
        .unwrap_or_default()
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object[key].as_str().unwrap_or_default()
}

fn name(object: &Value) -> &str {
    text(&object["metadata"], "name")
}

/// What an object says, on one line, the most telling first: its conditions, then the rest of its status.
pub fn summary(object: &Value) -> String {
    let mut rest = object["status"].clone();
    let conditions = rest.as_object_mut().and_then(|status| status.remove("conditions"));
    let said = |c: &Value| {
        format!(
            "{}={}/{}: {}",
            text(c, "type"),
            text(c, "status"),
            text(c, "reason"),
            text(c, "message")
        )
    };
    let conditions = conditions
        .as_ref()
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(said);
    conditions.chain([rest.to_string()]).collect::<Vec<_>>().join("; ")
}

/// Seconds of a duration as objects hold it: `850ms`, `1.4s`, `2m3s`; zero if there is none.
pub fn seconds(text: &Value) -> f64 {
    let parsed = text.as_str().and_then(|t| t.parse::<jiff::SignedDuration>().ok());
    parsed.unwrap_or_default().as_secs_f64()
}

impl Test {
    /// Applies YAML (server-side, any number of documents) in this test's namespace.
    pub async fn apply(&self, yaml: &str) {
        self.try_apply(yaml)
            .await
            .unwrap_or_else(|error| panic!("not accepted: {error}\n{yaml}"));
    }

    /// As [`Test::apply`] where the API server's refusal is of interest.
    pub async fn try_apply(&self, yaml: &str) -> Result<String, String> {
        let namespace = self.namespace();
        let args = [
            "apply",
            "--server-side",
            "--force-conflicts",
            "-n",
            &namespace,
            "-f",
            "-",
        ];
        self.kube().kubectl_with_input(&args, yaml).await
    }

    /// Applies Secret `berth-client` and one InstanceServer per lab server, under its lab name, pinned by fingerprint.
    /// Any member stands for its cluster: `["m1"]` is enough.
    pub async fn add_servers(&self, names: &[&str]) {
        self.add_client_secret("berth-client").await;
        for name in names {
            self.add_server(name, self.lab().server(name), json!({})).await;
        }
    }

    /// Applies a Secret with the client certificate that the lab trusts.
    pub async fn add_client_secret(&self, name: &str) {
        let lab = self.lab();
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "kubernetes.io/tls",
            "stringData": {"tls.crt": lab.client_cert(), "tls.key": lab.client_key()},
        });
        self.apply(&secret.to_string()).await;
    }

    /// Applies an InstanceServer for a lab server (for its whole cluster, if it is in one); `spec` is merged over the usual one.
    pub async fn add_server(&self, name: &str, server: &Server, spec: Value) {
        let mut usual = json!({
            "addresses": self.lab().addresses(server),
            "credentials": {"secretRef": {"name": "berth-client"}},
            "serverCertificate": {"fingerprint": server.fingerprint},
        });
        merge(&mut usual, spec);
        let object = json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "InstanceServer", "metadata": {"name": name}, "spec": usual,
        });
        self.apply(&object.to_string()).await;
    }

    /// Applies an InstancePlacement.
    pub async fn place(&self, placement: &Placement) {
        let object = json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "InstancePlacement",
            "metadata": {"name": placement.name}, "spec": placement.spec,
        });
        self.apply(&object.to_string()).await;
    }

    /// Merge-patches an object of one of the project's kinds, e.g. `("InstancePlacement", "web", {"spec": ...})`.
    pub async fn patch(&self, kind: &str, name: &str, patch: Value) {
        let api = self.kube().api(kind, &self.namespace());
        let done = api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        done.unwrap_or_else(|error| panic!("patch {kind} {name}: {error}"));
    }

    /// Asks for an object to be looked at anew, as `flux reconcile` and people do; each time with another word.
    pub async fn ask_again(&self, kind: &str, name: &str, word: &str) {
        let annotations = json!({"reconcile.fluxcd.io/requestedAt": word});
        self.patch(kind, name, json!({"metadata": {"annotations": annotations}}))
            .await;
    }

    /// Edits `spec.target` of a placement, as `kubectl patch` does.
    pub async fn retarget(&self, placement: &str, target: Value) {
        self.patch("InstancePlacement", placement, json!({"spec": {"target": target}}))
            .await;
    }

    /// Deletes an object; that finalizers hold it is no error.
    pub async fn delete(&self, kind: &str, name: &str) {
        let api = self.kube().api(kind, &self.namespace());
        let done = api.delete(name, &DeleteParams::default()).await;
        done.unwrap_or_else(|error| panic!("delete {kind} {name}: {error}"));
    }

    /// An object, or nothing.
    pub async fn get(&self, kind: &str, name: &str) -> Option<Value> {
        self.try_get(kind, name)
            .await
            .unwrap_or_else(|error| panic!("get {kind} {name}: {error}"))
    }

    async fn try_get(&self, kind: &str, name: &str) -> Result<Option<Value>, kube::Error> {
        let object = self.kube().api(kind, &self.namespace()).get_opt(name).await?;
        Ok(object.map(|object| json!(object)))
    }

    /// All objects of a kind in this test's namespace, oldest first.
    pub async fn list(&self, kind: &str) -> Vec<Value> {
        let list = self
            .kube()
            .api(kind, &self.namespace())
            .list(&ListParams::default())
            .await;
        let list = list.unwrap_or_else(|error| panic!("list {kind}: {error}"));
        let mut objects: Vec<Value> = list.items.iter().map(|object| json!(object)).collect();
        let age = |object: &Value| {
            object["metadata"]["creationTimestamp"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        objects.sort_by_key(age);
        objects
    }

    /// The moves of a placement, by attempt.
    pub async fn moves(&self, placement: &str) -> Vec<Value> {
        let mut moves = self.list("InstanceMove").await;
        moves.retain(|object| object["spec"]["placement"] == placement);
        moves.sort_by_key(|object| object["spec"]["attempt"].as_u64());
        moves
    }

    /// Waits until a cancelled move is over, or says that a server never ends it, as Incus 6.0.4 does now and then: then the
    /// daemon is restarted, as it says. The name of that server. For tests that have the servers for themselves.
    pub async fn restart_what_never_ends(&self, record: &str, within: Duration) -> Option<String> {
        let told = self
            .wait_object("InstanceMove", record, "over, or up to a person", within, |object| {
                object["status"]["outcome"].is_string() || object["status"]["lastError"]["reason"] == "NeedsAttention"
            })
            .await;
        if told["status"]["outcome"].is_string() {
            return None;
        }
        let fix = told["status"]["lastError"]["fix"].as_str().unwrap_or_default();
        assert!(fix.contains("systemctl restart incus"), "{told:#}");
        let host = fix
            .strip_prefix("on the host of ")
            .and_then(|rest| rest.split(',').next());
        let name = host.unwrap_or_else(|| panic!("it names no server: {told:#}"));
        let server = self.lab().server(name);
        server.kill_daemon().await;
        server.start_daemon().await;
        Some(name.to_owned())
    }

    /// A line for each move that did not succeed and each placement that is not in place: what a failed test's report ends with.
    pub(crate) async fn story(&self) -> String {
        let moves = self.list("InstanceMove").await;
        let moves = moves.iter().filter(|m| m["status"]["outcome"] != "Succeeded").map(|m| {
            let status = &m["status"];
            format!(
                "{} {}/{}: {}",
                name(m),
                status["step"],
                status["outcome"],
                status["undo"]
            )
        });
        let placements = self.list("InstancePlacement").await;
        let placements = placements.iter().filter(|p| reason(p) != "True/InPlace");
        let placements = placements.map(|p| format!("{} {}", name(p), summary(p)));
        moves.chain(placements).collect::<Vec<_>>().join("\n")
    }

    /// Waits until an object exists and fits; an API server that is away is waited for too.
    pub async fn wait_object(
        &self,
        kind: &str,
        name: &str,
        what: &str,
        within: Duration,
        fits: impl Fn(&Value) -> bool,
    ) -> Value {
        let api = self.kube().api(kind, &self.namespace());
        self.wait_in(&api, name, what, within, fits).await
    }

    /// As [`Test::wait_object`], for objects of any kind: see [`Kube::any`](crate::Kube::any).
    pub async fn wait_in(
        &self,
        api: &Api<DynamicObject>,
        name: &str,
        what: &str,
        within: Duration,
        fits: impl Fn(&Value) -> bool,
    ) -> Value {
        wait_for(&format!("{name}: {what}"), within, || async {
            match api.get_opt(name).await.map(|object| object.map(|object| json!(object))) {
                Ok(Some(object)) if fits(&object) => Ok(object),
                Ok(Some(object)) => Err(summary(&object)),
                Ok(None) => Err("no such object".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        })
        .await
    }

    /// Waits until `Ready` of the object's present generation is e.g. `True/InPlace`.
    pub async fn wait_ready(&self, kind: &str, name: &str, ready: &str, within: Duration) -> Value {
        self.wait_object(kind, name, ready, within, |object| {
            reason(object) == ready
                && condition(object, "Ready")
                    .is_some_and(|c| c["observedGeneration"] == object["metadata"]["generation"])
        })
        .await
    }

    /// Waits until the placement is `True/InPlace` on the given server.
    pub async fn wait_in_place(&self, placement: &str, server: &str, within: Duration) -> Value {
        self.wait_object(
            "InstancePlacement",
            placement,
            &format!("in place on {server}"),
            within,
            |object| {
                reason(object) == "True/InPlace"
                    && object["status"]["location"]["server"] == server
                    && object["status"]["observedGeneration"] == object["metadata"]["generation"]
            },
        )
        .await
    }

    /// Waits until the newest move of a placement has reached one of the steps (or has ended), and returns it.
    pub async fn wait_step(&self, placement: &str, steps: &[&str], within: Duration) -> Value {
        wait_for(&format!("a move of {placement} at {steps:?}"), within, || async {
            let list = self
                .kube()
                .api("InstanceMove", &self.namespace())
                .list(&ListParams::default())
                .await;
            let list = list.map_err(|error| error.to_string())?;
            let moves = list
                .items
                .iter()
                .map(|object| json!(object))
                .filter(|m| m["spec"]["placement"] == placement);
            let newest = moves
                .max_by_key(|object| object["spec"]["attempt"].as_u64())
                .ok_or("no move")?;
            let step = newest["status"]["step"].as_str().unwrap_or("Accepted");
            let ended = newest["status"]["outcome"].is_string();
            if steps.contains(&step) || ended {
                Ok(newest)
            } else {
                Err(format!("step {step}"))
            }
        })
        .await
    }

    /// Kubernetes Events about an object, `reason: message` each.
    pub async fn events(&self, name: &str) -> Vec<String> {
        let namespace = self.namespace();
        let args = ["get", "events", "-n", &namespace, "-o", "json"];
        let text = self
            .kube()
            .kubectl(&args)
            .await
            .unwrap_or_else(|error| panic!("events: {error}"));
        let list: Value = serde_json::from_str(&text).unwrap_or_default();
        let about = |event: &&Value| event["involvedObject"]["name"] == name || event["regarding"]["name"] == name;
        let line = |event: &Value| {
            let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
            format!("{}: {}", text("reason"), text("message"))
        };
        list["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(about)
            .map(line)
            .collect()
    }
}
