//! A Kustomization of Flux that follows a repository.

use berth_tests::{SOON, Test, example, reason};
use serde_json::Value;

use super::Shop;

/// Has Flux follow the repository as `examples/flux/<file>` says, looking every second.
pub async fn follow(test: &Test, shop: &Shop, file: &str, timeout: &str, interval: &str) {
    let namespace = test.namespace();
    let sync = example(
        &format!("flux/{file}"),
        &[
            ("https://git.example.com/shop.git", shop.url()),
            ("namespace: shop", &format!("namespace: {namespace}")),
            ("targetNamespace: shop", &format!("targetNamespace: {namespace}")),
            ("interval: 1m", &format!("interval: {interval}")),
            ("retryInterval: 1m", "retryInterval: 2s"),
            ("timeout: 2h", &format!("timeout: {timeout}")),
        ],
    );
    test.apply(&sync).await;
}

/// Kustomizations of the test.
pub fn kustomization(test: &Test) -> kube::Api<kube::api::DynamicObject> {
    test.kube()
        .any("kustomize.toolkit.fluxcd.io/v1", "Kustomization", &test.namespace())
}

/// Whether the Kustomization is Ready with this commit.
pub fn is_applied(object: &Value, commit: &str) -> bool {
    let revision = object["status"]["lastAppliedRevision"].as_str().unwrap_or_default();
    reason(object).starts_with("True/") && revision.ends_with(commit)
}

/// Waits until the Kustomization is Ready with this commit.
pub async fn applied(test: &Test, commit: &str) -> Value {
    let what = format!("Ready with {commit}");
    test.wait_in(&kustomization(test), "shop", &what, SOON, |object| {
        is_applied(object, commit)
    })
    .await
}
