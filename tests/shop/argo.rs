//! An Application of Argo CD, what it was seen to be from its beginning, and the actions of its resources.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_tests::{SOON, Test, argo_lua, example, wait_for};
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};

use super::{Shop, Way};

/// The scripts.
pub const SCRIPTS: &str = "charts/berth/argocd/resource_customizations";

/// `Synced/Healthy` and the like.
pub fn state(app: &Value) -> String {
    let text = |value: &Value| value["status"].as_str().unwrap_or("-").to_owned();
    format!("{}/{}", text(&app["status"]["sync"]), text(&app["status"]["health"]))
}

/// Commit and state, whenever one of them was another than before.
type Seen = Vec<(String, String)>;

/// Looks at an Application until it is told to end.
pub struct Watch {
    task: tokio::task::JoinHandle<()>,
    seen: Arc<Mutex<Seen>>,
}

impl Watch {
    /// Begins.
    pub fn begin(api: &Api<DynamicObject>, name: &str) -> Watch {
        let seen = Arc::new(Mutex::new(Seen::new()));
        let (api, name, kept) = (api.clone(), name.to_owned(), Arc::clone(&seen));
        let task = tokio::spawn(async move {
            let mut looks = tokio::time::interval(Duration::from_millis(50));
            loop {
                looks.tick().await;
                let Ok(app) = api.get(&name).await else { continue };
                let app = json!(app);
                let commit = app["status"]["sync"]["revision"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
                let now = (commit, state(&app));
                let mut seen = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if seen.last() != Some(&now) {
                    seen.push(now);
                }
            }
        });
        Watch { task, seen }
    }

    /// Ends; fails if what was applied of a commit ever differed from it again.
    pub fn end_without_a_difference_of_the_same_commit(self) {
        self.task.abort();
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (number, (commit, state)) in seen.iter().enumerate() {
            let synced_before = seen[..number]
                .iter()
                .any(|(c, s)| c == commit && s.starts_with("Synced/"));
            assert!(
                !(synced_before && state.starts_with("OutOfSync/")),
                "a difference came up: {seen:#?}"
            );
        }
    }
}

/// One Application that follows one repository, as `examples/argocd/application.yaml` says; it bears the name of the test's namespace.
pub struct App {
    test: Test,
    /// The repository.
    pub shop: Shop,
    /// Applications.
    pub api: Api<DynamicObject>,
}

impl App {
    /// Argo CD follows a repository with these placements.
    pub async fn follow(test: &Test, placements: &str) -> App {
        let shop = Shop::new(test, test.argo().await, Way::Argo, placements).await;
        let namespace = test.namespace();
        let text = example(
            "argocd/application.yaml",
            &[
                ("https://git.example.com/shop.git", shop.url()),
                ("namespace: shop", &format!("namespace: {namespace}")),
                ("name: shop", &format!("name: {namespace}")),
            ],
        );
        let applied = test
            .kube()
            .kubectl_with_input(&["apply", "--server-side", "-f", "-"], &text)
            .await;
        applied.unwrap_or_else(|error| panic!("{error}\n{text}"));
        let api = test.kube().any("argoproj.io/v1alpha1", "Application", "argocd");
        App {
            test: test.clone(),
            shop,
            api,
        }
    }

    /// Argo CD forgets it; its objects stay.
    pub async fn delete(&self) {
        let done = self.api.delete(&self.name(), &DeleteParams::default()).await;
        done.unwrap_or_else(|error| panic!("delete the application: {error}"));
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.test.namespace()
    }

    /// What a webhook does after a push: Argo CD looks at Git now.
    pub async fn refresh(&self, how: &str) {
        let patch = json!({"metadata": {"annotations": {"argocd.argoproj.io/refresh": how}}});
        let done = self
            .api
            .patch(&self.name(), &PatchParams::default(), &Patch::Merge(patch))
            .await;
        done.unwrap_or_else(|error| panic!("refresh: {error}"));
    }

    /// Commits other placements and tells Argo CD.
    pub async fn commit(&self, message: &str, placements: &str) -> String {
        let commit = self.shop.commit(message, placements).await;
        self.refresh("normal").await;
        commit
    }

    /// Waits until the Application is e.g. `Synced/Healthy` with this commit.
    pub async fn wait(&self, commit: &str, wanted: &str) -> Value {
        let what = format!("{wanted} with {commit}");
        self.test
            .wait_in(&self.api, &self.name(), &what, SOON, |app| {
                state(app) == wanted
                    && app["status"]["sync"]["revision"] == commit
                    && app["status"]["operationState"]["phase"] == "Succeeded"
            })
            .await
    }

    /// Health of a resource as Argo CD has it: status and message.
    pub async fn health(&self, kind: &str, name: &str) -> (String, String) {
        let app = self.api.get(&self.name()).await.map(|app| json!(app));
        let app = app.unwrap_or_else(|error| panic!("the application: {error}"));
        let resources = app["status"]["resources"].as_array().cloned().unwrap_or_default();
        let resource = resources.iter().find(|r| r["kind"] == kind && r["name"] == name);
        let health = resource.map_or(Value::Null, |r| r["health"].clone());
        let text = |key: &str| health[key].as_str().unwrap_or_default().to_owned();
        (text("status"), text("message"))
    }

    /// What an action makes of the live object in Argo CD's engine; an error if it is not offered for it.
    pub async fn try_act(&self, kind: &str, name: &str, action: &str) -> Result<Value, String> {
        let object = self.test.get(kind, name).await.ok_or("no such object")?;
        let said = argo_lua(&["action", SCRIPTS, action], &object.to_string()).await?;
        serde_json::from_str(&said).map_err(|error| format!("{error}: {said}"))
    }

    /// Runs an action as Argo CD's API server does: what it changes is sent as a merge patch.
    pub async fn act(&self, kind: &str, name: &str, action: &str) {
        let changed = wait_for(&format!("{action} to be offered for {name}"), SOON, || {
            self.try_act(kind, name, action)
        })
        .await;
        let patch = json!({"metadata": {"annotations": changed["metadata"]["annotations"]}, "spec": changed["spec"]});
        self.test.patch(kind, name, patch).await;
    }
}
