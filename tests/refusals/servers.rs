//! InstanceServers that cannot be used: the reason says why, and what is mended is found by itself.

use berth_tests::{SOON, Test, condition, reason};
use serde_json::json;

use crate::road::{subject, with_data};
use crate::{inventory, message, says, stalled};

pub async fn a_missing_secret_is_named_and_found_once_it_exists(test: Test) {
    let server = test.lab().server("i1");
    test.add_server("rack", server, json!({})).await;
    let _controller = test.controller().await;
    let words = ["berth-client", "does not exist", "kubectl create secret tls"];
    stalled(&test, "InstanceServer", "rack", "CredentialsMissing", &words).await;
    test.add_client_secret("berth-client").await;
    test.wait_ready("InstanceServer", "rack", "True/Connected", SOON).await;
}

async fn apply_pair(test: &Test, certificate: &str, key: &str) {
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "berth-client"}, "type": "kubernetes.io/tls",
        "stringData": {"tls.crt": certificate, "tls.key": key},
    });
    test.apply(&secret.to_string()).await;
}

/// A certificate and a key that nobody knows.
fn stranger() -> (String, String) {
    let made = rcgen::generate_simple_self_signed(["stranger".to_owned()]);
    let made = made.unwrap_or_else(|error| panic!("a certificate: {error}"));
    (made.cert.pem(), made.signing_key.serialize_pem())
}

pub async fn a_certificate_that_is_no_pem_is_refused(test: Test) {
    let lab = test.lab();
    apply_pair(&test, "certificate", &lab.client_key()).await;
    test.add_server("rack", lab.server("l1"), json!({})).await;
    let _controller = test.controller().await;
    let words = ["berth-client", "tls.crt", "PEM"];
    let why = "CredentialsInvalid";
    let object = stalled(&test, "InstanceServer", "rack", why, &words).await;
    assert!(!message(&object).contains("PRIVATE"), "no key is shown");
    // broken another way, which makes it say something else
    let (_, other_key) = stranger();
    apply_pair(&test, &lab.client_cert(), &other_key).await;
    let mut said = message(&object);
    test.wait_object("InstanceServer", "rack", "the key does not fit", SOON, |object| {
        message(object) != said && reason(object) == format!("False/{why}")
    })
    .await;
    apply_pair(&test, &lab.client_cert(), &lab.client_key()).await;
    said = message(&test.wait_ready("InstanceServer", "rack", "True/Connected", SOON).await);
    assert!(said.starts_with("LXD"), "{said}");
}

pub async fn a_wrong_fingerprint_is_refused_and_the_right_one_is_named(test: Test) {
    let server = test.lab().server("i1");
    test.add_client_secret("berth-client").await;
    let wrong = "ab".repeat(32);
    let spec = json!({"serverCertificate": {"fingerprint": wrong}});
    test.add_server("rack", server, spec).await;
    let _controller = test.controller().await;
    let words = [server.fingerprint.as_str(), "spec.serverCertificate.fingerprint"];
    stalled(&test, "InstanceServer", "rack", "CertificateMismatch", &words).await;
    let right = json!({"spec": {"serverCertificate": {"fingerprint": server.fingerprint}}});
    test.patch("InstanceServer", "rack", right).await;
    test.wait_ready("InstanceServer", "rack", "True/Connected", SOON).await;
}

pub async fn a_certificate_that_the_server_does_not_trust_is_refused(test: Test) {
    let lab = test.lab();
    let (certificate, key) = stranger();
    apply_pair(&test, &certificate, &key).await;
    test.add_server("incus", lab.server("i2"), json!({})).await;
    test.add_server("lxd", lab.server("l2"), json!({})).await;
    let _controller = test.controller().await;
    for name in ["incus", "lxd"] {
        stalled(&test, "InstanceServer", name, "NotTrusted", &["config trust add"]).await;
    }
    apply_pair(&test, &lab.client_cert(), &lab.client_key()).await;
    for name in ["incus", "lxd"] {
        test.wait_ready("InstanceServer", name, "True/Connected", SOON).await;
    }
}

pub async fn a_server_that_does_not_answer_is_reported_and_holds_its_placements_back(test: Test) {
    test.add_servers(&["i1"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    // nobody listens on port 1
    let nowhere = json!({"addresses": ["https://127.0.0.1:1"]});
    test.add_server("rack", test.lab().server("i2"), nowhere).await;
    test.retarget(&web.name, json!({"server": "rack"})).await;
    let before = inventory(&test).await;
    let _controller = test.controller().await;
    let object = test
        .wait_ready("InstanceServer", "rack", "False/Unreachable", SOON)
        .await;
    says(&object, &["127.0.0.1:1", "spec.addresses"]);
    assert!(
        condition(&object, "Reconciling").is_some(),
        "it is tried again by itself"
    );
    let object = test
        .wait_ready("InstancePlacement", &web.name, "Unknown/ServerUnreachable", SOON)
        .await;
    says(&object, &["rack", "127.0.0.1:1"]);
    assert!(test.moves(&web.name).await.is_empty());
    assert_eq!(inventory(&test).await, before, "nothing changed on any server");
    let there = json!({"spec": {"addresses": [test.lab().server("i2").url]}});
    test.patch("InstanceServer", "rack", there).await;
    test.wait_in_place(&web.name, "rack", SOON).await;
    assert_eq!(test.lab().server("i2").status(&web.name).await, "Running");
}
