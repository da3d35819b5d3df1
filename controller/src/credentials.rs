//! Who we are to a server, and how it is recognised: from the Secret that an InstanceServer names, or from a trust token,
//! for which a certificate is made and stored before the token is used. Nothing of a Secret is ever logged.

use std::collections::BTreeMap;

use berth_api::server::{SecretKey, ServerCertificate};
use berth_api::{InstanceServer, Reason, keys, present};
use berth_client::trust::{self, TrustError};
use berth_client::{Identity, ServerTrust};
use berth_core::server::FailureKind;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use kube::api::{ObjectMeta, PostParams};
use secrecy::{ExposeSecret, SecretString};

use crate::store::{Store, StoreError};

const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
/// In a Secret made for a token: the fingerprint that the token carried.
const FINGERPRINT: &str = "server-fingerprint";
const TYPE: &str = "kubernetes.io/tls";
const LABEL_MAX: usize = 63;

/// What is needed for a connection.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    pub identity: Identity,
    pub trust: ServerTrust,
    /// The token to join with, while its Secret exists.
    pub token: Option<SecretString>,
}

impl Credentials {
    /// Whether a connection made with the other ones would be the same.
    pub fn is_same(&self, other: &Self) -> bool {
        self.trust == other.trust
            && self.identity.certificate == other.identity.certificate
            && self.identity.key.expose_secret() == other.identity.key.expose_secret()
    }
}

/// Why there are none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    /// A person has to do something: the reason, and a sentence that says what.
    Refused(Reason, String),
    /// It could not be found out now.
    Unavailable(String),
    /// Only the leader makes certificates.
    NotLeading,
}

fn refused<T>(reason: Reason, message: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Refused(reason, message.into()))
}

impl Store {
    /// Reads what an InstanceServer names. With a trust token and no certificate yet, makes and stores one.
    pub async fn credentials(&self, server: &InstanceServer) -> Result<Credentials, Problem> {
        let namespace = server.namespace().unwrap_or_default();
        let pinned = server.spec.server_certificate.as_ref().and_then(trust_of);
        let named = &server.spec.credentials;
        match (&named.secret_ref, &named.trust_token_ref) {
            (Some(secret), _) => {
                let Some(found) = self.secret(&namespace, &secret.name).await? else {
                    let (name, n) = (&secret.name, &namespace);
                    let fix = format!("kubectl create secret tls {name} -n {n} --cert=client.crt --key=client.key");
                    return refused(
                        Reason::CredentialsMissing,
                        format!("Secret {n}/{name} does not exist: {fix}"),
                    );
                };
                let Some(trust) = pinned else {
                    let what = "spec.serverCertificate says nothing: set its fingerprint, pem or systemRoots: true";
                    return refused(Reason::InvalidSpec, what);
                };
                Ok(Credentials {
                    identity: identity_of(&found, &namespace)?,
                    trust,
                    token: None,
                })
            }
            (None, Some(token)) => self.by_token(server, token, pinned).await,
            (None, None) => refused(
                Reason::CredentialsMissing,
                "spec.credentials names neither a Secret nor a trust token",
            ),
        }
    }

    async fn by_token(
        &self,
        server: &InstanceServer,
        wanted: &SecretKey,
        pinned: Option<ServerTrust>,
    ) -> Result<Credentials, Problem> {
        let (namespace, own) = (server.namespace().unwrap_or_default(), client_secret_name(server));
        let token = self
            .secret(&namespace, &wanted.name)
            .await?
            .and_then(|secret| text(&secret, &wanted.key))
            .map(SecretString::from);
        let stored = match self.secret(&namespace, &own).await? {
            Some(secret) => secret,
            None => self.new_identity(server, wanted, token.as_ref()).await?,
        };
        if stored.labels().get(keys::SERVER) != Some(&label_of(server)) {
            return refused(
                Reason::CredentialsInvalid,
                format!(
                    "Secret {namespace}/{own} exists and was not made by Berth: delete or rename it, or name it in spec.credentials.secretRef"
                ),
            );
        }
        let carried = text(&stored, FINGERPRINT).map(ServerTrust::Fingerprint);
        let Some(trust) = pinned.or(carried) else {
            let fix = "delete it, and a new one is made with a new token";
            return refused(
                Reason::CredentialsInvalid,
                format!("Secret {namespace}/{own} has no {FINGERPRINT}: {fix}"),
            );
        };
        Ok(Credentials {
            identity: identity_of(&stored, &namespace)?,
            trust,
            token,
        })
    }

    /// Makes a certificate and stores it, before the token is used: a token that was used for a lost key is lost.
    async fn new_identity(
        &self,
        server: &InstanceServer,
        wanted: &SecretKey,
        token: Option<&SecretString>,
    ) -> Result<Secret, Problem> {
        let namespace = server.namespace().unwrap_or_default();
        let Some(token) = token else {
            let SecretKey { name, key } = wanted;
            let fix = format!("kubectl create secret generic {name} -n {namespace} --from-literal={key}=TOKEN");
            return refused(
                Reason::CredentialsMissing,
                format!("Secret {namespace}/{name} has no key {key}, or does not exist: {fix}"),
            );
        };
        let read = trust::parse_token(token).map_err(|e| join_problem(&e))?;
        if read.expires_at.is_some_and(|end| end <= Timestamp::now()) {
            return refused(Reason::TokenUsed, format!("the trust token has expired; {NEW_TOKEN}"));
        }
        let name = server.name_any();
        let identity = trust::new_identity(&format!("berth {namespace}/{name}")).map_err(|e| join_problem(&e))?;
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(client_secret_name(server)),
                namespace: Some(namespace.clone()),
                labels: Some(BTreeMap::from([(keys::SERVER.to_owned(), label_of(server))])),
                ..ObjectMeta::default()
            },
            type_: Some(TYPE.to_owned()),
            data: Some(BTreeMap::from([
                (CERTIFICATE.to_owned(), bytes(&identity.certificate)),
                (KEY.to_owned(), bytes(identity.key.expose_secret())),
                (FINGERPRINT.to_owned(), bytes(&read.fingerprint)),
            ])),
            ..Secret::default()
        };
        let api = self.api::<Secret>(&namespace);
        let what = format!("create Secret {namespace}/{}", client_secret_name(server));
        match self.write(&what, api.create(&PostParams::default(), &secret)).await {
            Ok(stored) => Ok(stored),
            Err(StoreError::NotLeading(_)) => Err(Problem::NotLeading),
            Err(error @ StoreError::Forbidden(..)) => refused(
                Reason::CredentialsMissing,
                format!("{error}; trust tokens need the right to create Secrets (chart value trustTokens.enabled)"),
            ),
            Err(error) => Err(Problem::Unavailable(error.to_string())),
        }
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Secret>, Problem> {
        let api = self.api::<Secret>(namespace);
        match self
            .read(&format!("read Secret {namespace}/{name}"), api.get_opt(name))
            .await
        {
            Ok(found) => Ok(found),
            Err(StoreError::NotFound(_)) => Ok(None),
            Err(error @ StoreError::Forbidden(..)) => refused(Reason::CredentialsMissing, error.to_string()),
            Err(error) => Err(Problem::Unavailable(error.to_string())),
        }
    }
}

const NEW_TOKEN: &str =
    "make a new one (incus config trust add berth, lxc config trust add --name berth) and put it into the Secret";

/// Why joining with a token failed.
pub(crate) fn join_problem(error: &TrustError) -> Problem {
    let (reason, message) = match error {
        TrustError::Token(_) => (Reason::CredentialsInvalid, format!("{error}; {NEW_TOKEN}")),
        TrustError::Connect(_) => (Reason::InvalidSpec, error.to_string()),
        TrustError::Certificate(_) => (Reason::CredentialsInvalid, error.to_string()),
        TrustError::Server(e) => match e.kind {
            FailureKind::Unreachable | FailureKind::Unknown | FailureKind::Busy => {
                (Reason::Unreachable, error.to_string())
            }
            FailureKind::CertificateMismatch => (Reason::CertificateMismatch, error.to_string()),
            FailureKind::Protocol | FailureKind::PeerUnreachable | FailureKind::ScratchFull => {
                (Reason::UnsupportedServer, error.to_string())
            }
            FailureKind::NotFound
            | FailureKind::AlreadyExists
            | FailureKind::Changed
            | FailureKind::Refused
            | FailureKind::Running
            | FailureKind::NotTrusted => (
                Reason::TokenUsed,
                format!("the server does not take the trust token ({error}): it was used or has expired; {NEW_TOKEN}"),
            ),
        },
    };
    Problem::Refused(reason, message)
}

fn trust_of(certificate: &ServerCertificate) -> Option<ServerTrust> {
    let pem = present(&certificate.pem).map(|p| ServerTrust::Pem(p.to_owned()));
    let fingerprint = present(&certificate.fingerprint).map(|f| ServerTrust::Fingerprint(f.to_owned()));
    pem.or(fingerprint)
        .or(certificate.system_roots.then_some(ServerTrust::SystemRoots))
}

/// Name of the Secret that is made for a token.
fn client_secret_name(server: &InstanceServer) -> String {
    format!("{}-client", server.name_any())
}

/// The server's name as a label, which may be shorter.
fn label_of(server: &InstanceServer) -> String {
    let name: String = server.name_any().chars().take(LABEL_MAX).collect();
    name.trim_end_matches(['-', '.']).to_owned()
}

fn text(secret: &Secret, key: &str) -> Option<String> {
    let bytes = &secret.data.as_ref()?.get(key)?.0;
    let text = String::from_utf8(bytes.clone()).ok()?;
    Some(text).filter(|t| !t.trim().is_empty())
}

fn identity_of(secret: &Secret, namespace: &str) -> Result<Identity, Problem> {
    let part = |key: &str| {
        text(secret, key).ok_or_else(|| {
            let message = format!(
                "Secret {namespace}/{} has no usable {key}: it must be of type {TYPE}, with the client certificate in {CERTIFICATE} and its key in {KEY}",
                secret.name_any()
            );
            Problem::Refused(Reason::CredentialsInvalid, message)
        })
    };
    Ok(Identity {
        certificate: part(CERTIFICATE)?,
        key: part(KEY)?.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(data: &[(&str, &str)]) -> Secret {
        let data = data
            .iter()
            .map(|(k, v)| ((*k).to_owned(), ByteString(v.as_bytes().to_vec())));
        Secret {
            metadata: ObjectMeta {
                name: Some("berth-client".to_owned()),
                ..ObjectMeta::default()
            },
            data: Some(data.collect()),
            ..Secret::default()
        }
    }

    #[test]
    fn a_secret_without_a_key_says_which_one_is_missing() {
        let problem = identity_of(&secret(&[(CERTIFICATE, "c")]), "shop").unwrap_err();
        let Problem::Refused(Reason::CredentialsInvalid, message) = problem else {
            panic!("{problem:?}")
        };
        assert!(
            message.starts_with("Secret shop/berth-client has no usable tls.key"),
            "{message}"
        );
    }

    #[test]
    fn another_key_is_another_connection() {
        let credentials = |key: &str| Credentials {
            identity: identity_of(&secret(&[(CERTIFICATE, "c"), (KEY, key)]), "shop").unwrap(),
            trust: ServerTrust::SystemRoots,
            token: None,
        };
        assert!(credentials("a").is_same(&credentials("a")));
        assert!(!credentials("a").is_same(&credentials("b")));
    }

    #[test]
    fn no_form_of_credentials_shows_the_key() {
        let shown = format!(
            "{:?}",
            identity_of(&secret(&[(CERTIFICATE, "c"), (KEY, "hush")]), "shop")
        );
        assert!(!shown.contains("hush"), "{shown}");
    }

    #[test]
    fn the_label_of_a_long_name_is_a_valid_one() {
        let mut server = InstanceServer::new(&format!("{}.b", "a".repeat(62)), Default::default());
        server.metadata.namespace = Some("ns".into());
        assert_eq!(label_of(&server), "a".repeat(62));
    }
}
