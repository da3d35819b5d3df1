//! Who is talked to: pins, broken certificates, several addresses, trust tokens.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use berth_client::{ConnectError, Identity, ServerTrust, certificate_fingerprint, connect, trust};
use berth_core::model::InstanceRef;
use berth_core::server::{FailureKind, PowerAction, Server};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::fake::{Fake, Reply, error, sync};
use crate::{Capture, client, client_of, endpoint, identity};

fn empty_inventory() -> Vec<(&'static str, Value)> {
    vec![("/1.0/instances?recursion=1&all-projects=true", sync(json!([])))]
}

#[tokio::test]
async fn a_pinned_certificate_is_accepted_whatever_name_it_has() {
    let fake = Fake::reading(empty_inventory()).await;
    let fingerprint = certificate_fingerprint(&fake.certificate).unwrap();
    let with_colons: Vec<&str> = (0..32).map(|i| &fingerprint[2 * i..2 * i + 2]).collect();
    for pin in [
        ServerTrust::Pem(fake.certificate.clone()),
        ServerTrust::Fingerprint(fingerprint.clone()),
        ServerTrust::Fingerprint(with_colons.join(":").to_uppercase()),
    ] {
        let server = client_of(&[&fake.address], pin);
        assert_eq!(server.fingerprint(), None, "nothing was seen yet");
        assert_eq!(server.inventory().await.unwrap(), vec![]);
        assert_eq!(server.fingerprint(), Some(fingerprint.clone()));
    }
}

#[tokio::test]
async fn a_server_with_another_certificate_is_sent_nothing() {
    let (fake, other) = (Fake::reading(vec![]).await, Fake::reading(vec![]).await);
    let server = client_of(&[&fake.address], ServerTrust::Pem(other.certificate.clone()));
    let failure = server.inventory().await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::CertificateMismatch);
    for certificate in [&fake.certificate, &other.certificate] {
        assert!(
            failure.message.contains(&certificate_fingerprint(certificate).unwrap()),
            "{failure}"
        );
    }
    let failure = server.events().await.err().expect("no stream either");
    assert_eq!(failure.kind, FailureKind::CertificateMismatch);
    let failure = client_of(&[&fake.address], ServerTrust::SystemRoots)
        .inventory()
        .await
        .unwrap_err();
    assert_eq!(
        failure.kind,
        FailureKind::CertificateMismatch,
        "no root of this machine vouches for it"
    );
    assert!(fake.asked().is_empty());
}

#[test]
fn what_cannot_be_read_is_told_apart_before_anything_is_sent() {
    let good = endpoint(&["https://127.0.0.1:8443"], ServerTrust::Fingerprint("ab".repeat(32)));
    let with = |change: &dyn Fn(&mut berth_client::Endpoint)| {
        let mut endpoint = good.clone();
        change(&mut endpoint);
        connect(&endpoint).map(|_| ()).unwrap_err()
    };
    let broken_certificate = with(&|e| e.identity.certificate = "-----BEGIN CERTIFICATE-----\n%%%".to_owned());
    assert!(
        matches!(broken_certificate, ConnectError::ClientCertificate(_)),
        "{broken_certificate}"
    );
    let no_certificate = with(&|e| e.identity.certificate = String::new());
    assert!(
        matches!(no_certificate, ConnectError::ClientCertificate(_)),
        "{no_certificate}"
    );
    let broken_key = with(&|e| e.identity.key = "no key".to_owned().into());
    assert!(matches!(broken_key, ConnectError::ClientKey(_)), "{broken_key}");
    let other_key = with(&|e| e.identity.key = identity().key);
    assert!(matches!(other_key, ConnectError::ClientKey(_)), "{other_key}");
    let broken_pin = with(&|e| e.trust = ServerTrust::Fingerprint("abc".to_owned()));
    assert!(matches!(broken_pin, ConnectError::ServerCertificate(_)), "{broken_pin}");
    let broken_pem = with(&|e| e.trust = ServerTrust::Pem("nothing".to_owned()));
    assert!(matches!(broken_pem, ConnectError::ServerCertificate(_)), "{broken_pem}");
    let no_address = with(&|e| e.addresses.clear());
    assert!(matches!(no_address, ConnectError::Address { .. }), "{no_address}");
}

#[tokio::test]
async fn the_next_address_is_used_when_one_does_not_answer() {
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("https://{}", listener.local_addr().unwrap())
    };
    let fake = Fake::reading(empty_inventory()).await;
    let server = client_of(&[&closed, &fake.address], ServerTrust::Pem(fake.certificate.clone()));
    assert_eq!(server.address_in_use(), closed);
    server.inventory().await.unwrap();
    assert_eq!(server.address_in_use(), fake.address);
    assert_eq!(server.peer_address(), fake.address);
    let nobody = client_of(&[&closed], ServerTrust::Pem(fake.certificate.clone()));
    assert_eq!(nobody.inventory().await.unwrap_err().kind, FailureKind::Unreachable);
}

#[tokio::test]
async fn a_write_whose_answer_is_lost_is_not_repeated_anywhere() {
    let cut = Fake::start(|_| Reply::Cut).await;
    let other = Fake::reading(vec![]).await;
    let server = client_of(
        &[&cut.address, &other.address],
        ServerTrust::Pem(cut.certificate.clone()),
    );
    let at = InstanceRef::new("default", "web-1");
    let failure = server.set_power(&at, PowerAction::ForceStop).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Unknown);
    assert!(failure.attempted.contains("web-1"), "{failure}");
    assert_eq!((cut.asked().len(), other.asked().len()), (1, 0));
    assert_eq!(server.inventory().await.unwrap_err().kind, FailureKind::Unknown);
    assert_eq!(cut.asked().len(), 3, "a read is tried once more");
}

async fn joining(capture: &'static str) -> (Fake, SecretString) {
    let recorded = Capture::open(capture);
    let (look, accepted) = (recorded.get("/1.0"), recorded.nth(2).1);
    let fake = Fake::start(move |asked| match asked.method.as_str() {
        "GET" if asked.authenticated => Reply::Json(403, error(403, "not authorized")),
        "GET" => Reply::Json(200, look.clone()),
        _ => Reply::Json(201, accepted.clone()),
    })
    .await;
    // the recorded token names the recorded server: the same one for this server
    let token = json!({"client_name": "berth", "fingerprint": certificate_fingerprint(&fake.certificate).unwrap(),
        "addresses": [fake.address.trim_start_matches("https://")], "secret": "s", "expires_at": "0001-01-01T00:00:00Z"});
    (fake, STANDARD.encode(token.to_string()).into())
}

#[tokio::test]
async fn a_token_is_sent_in_the_field_that_the_product_reads() {
    for (capture, field) in [
        ("04-trust-token-incus-6.0.4", "trust_token"),
        ("04-trust-token-lxd-5.0.2", "password"),
    ] {
        let (fake, token) = joining(capture).await;
        let fingerprint = trust::join(&[], &token, "berth", &identity()).await.unwrap();
        assert_eq!(fingerprint, certificate_fingerprint(&fake.certificate).unwrap());
        let sent = fake.asked().pop().unwrap();
        assert_eq!(
            (sent.method.as_str(), sent.path.as_str()),
            ("POST", "/1.0/certificates")
        );
        assert_eq!(sent.body[field], token.expose_secret(), "{capture}");
        assert!(!sent.authenticated, "a stranger must not ask to be refused");
    }
}

#[tokio::test]
async fn a_token_is_never_shown_to_another_server() {
    let (_, token) = joining("04-trust-token-incus-6.0.4").await;
    let stranger = Fake::reading(vec![]).await;
    let failure = trust::join(std::slice::from_ref(&stranger.address), &token, "berth", &identity())
        .await
        .unwrap_err();
    let trust::TrustError::Server(failure) = failure else {
        panic!("{failure}")
    };
    assert_eq!(failure.kind, FailureKind::CertificateMismatch);
    assert!(stranger.asked().is_empty());
}

#[test]
fn recorded_tokens_are_read() {
    for capture in ["04-trust-token-incus-6.0.4", "04-trust-token-lxd-5.0.2"] {
        let recorded = Capture::open(capture);
        let body = &recorded.exchanges()[2]["request"]["body"];
        let text = body["trust_token"].as_str().or(body["password"].as_str()).unwrap();
        let token = trust::parse_token(&text.to_owned().into()).unwrap();
        assert_eq!((token.client_name.as_str(), token.expires_at), ("newcomer", None));
        assert_eq!((token.fingerprint.len(), token.addresses.len()), (64, 1));
    }
}

#[tokio::test]
async fn removed_trust_is_told_from_a_refusal() {
    let at = InstanceRef::new("shop", "web-1");
    let stranger = Fake::start(|_| Reply::Json(403, error(403, "not authorized"))).await;
    assert_eq!(
        client(&stranger).facts().await.unwrap_err().kind,
        FailureKind::NotTrusted
    );
    assert_eq!(
        client(&stranger).remove(&at).await.unwrap_err().kind,
        FailureKind::NotTrusted
    );
    assert!(stranger.asked().iter().all(|a| a.authenticated));
    for capture in ["02-untrusted-no-cert-incus-6.0.4", "02-untrusted-no-cert-lxd-5.0.2"] {
        let untrusted = Fake::reading(vec![("/1.0", Capture::open(capture).get("/1.0"))]).await;
        assert_eq!(
            client(&untrusted).facts().await.unwrap_err().kind,
            FailureKind::NotTrusted,
            "{capture}"
        );
    }
    let known = Fake::start(|asked| match asked.path.as_str() {
        "/1.0" => Reply::Json(200, sync(json!({"auth": "trusted"}))),
        _ => Reply::Json(403, error(403, "Cluster member is evacuated")),
    })
    .await;
    let refusal = client(&known).remove(&at).await.unwrap_err();
    assert_eq!(
        (refusal.kind, refusal.message.as_str()),
        (FailureKind::Refused, "Cluster member is evacuated")
    );
}

#[test]
fn a_new_certificate_is_of_the_kind_that_servers_take() {
    let Identity { certificate, key } = identity();
    assert!(certificate.starts_with("-----BEGIN CERTIFICATE-----"));
    assert!(key.expose_secret().starts_with("-----BEGIN PRIVATE KEY-----"));
    assert_ne!(
        certificate_fingerprint(&certificate),
        certificate_fingerprint(&identity().certificate)
    );
}
