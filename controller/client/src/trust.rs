//! Joining a server's trust store with a one-time token, and the certificate to join with. The token names the server's
//! certificate, so nothing is trusted on first use.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use berth_core::server::ServerError;
use jiff::Timestamp;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P384_SHA384};
use reqwest::Method;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;

use crate::answer::Answer;
use crate::http::{Call, Endpoint, HttpServer};
use crate::observe::RequestClass;
use crate::tls::{ConnectError, Identity, ServerTrust};
use crate::wire::{ServerWire, nullable};

/// How many years a new client certificate is valid, as with the servers' own clients.
const YEARS: i32 = 10;

/// Why trust could not be set up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// The token cannot be read or is over.
    #[error("trust token: {0}")]
    Token(String),
    /// No connection can be made at all.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The server refused, or could not be reached.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// No certificate could be made.
    #[error("new client certificate: {0}")]
    Certificate(String),
}

/// What a trust token says. The token itself is the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustToken {
    /// The name that the certificate gets on the server.
    pub client_name: String,
    /// SHA-256 of the server's certificate, lower-case hex.
    pub fingerprint: String,
    /// The server's addresses, `host:port`.
    pub addresses: Vec<String>,
    /// When it ends, if it does.
    pub expires_at: Option<Timestamp>,
}

#[derive(Deserialize)]
struct TokenWire {
    #[serde(default, deserialize_with = "nullable")]
    client_name: String,
    fingerprint: String,
    #[serde(default, deserialize_with = "nullable")]
    addresses: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    expires_at: String,
}

/// Reads a trust token (base64 of JSON).
pub fn parse_token(token: &SecretString) -> Result<TrustToken, TrustError> {
    let wrong = |reason: &str| TrustError::Token(reason.to_owned());
    let json = STANDARD
        .decode(token.expose_secret().trim())
        .map_err(|_| wrong("it is no base64 text"))?;
    // what serde says could quote the secret
    let wire: TokenWire = serde_json::from_slice(&json).map_err(|_| wrong("it is not the JSON of a token"))?;
    let expires_at = match wire.expires_at.as_str() {
        "" => None,
        // the servers write "never" as the year 1
        never if never.starts_with("0001-") => None,
        time => Some(time.parse().map_err(|_| wrong("its expiry is no time"))?),
    };
    let fingerprint = wire.fingerprint.to_ascii_lowercase();
    Ok(TrustToken {
        client_name: wire.client_name,
        fingerprint,
        addresses: wire.addresses,
        expires_at,
    })
}

/// A new client certificate for `common_name`: self-signed, ECDSA P-384, ten years.
pub fn new_identity(common_name: &str) -> Result<Identity, TrustError> {
    let failed = |e: rcgen::Error| TrustError::Certificate(e.to_string());
    let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    // one day back for clocks that differ; a day of the month that every year has
    let day = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date().yesterday();
    let day = day.map_err(|e| TrustError::Certificate(e.to_string()))?;
    let (month, first) = (day.month().unsigned_abs(), day.day().min(28).unsigned_abs());
    params.not_before = rcgen::date_time_ymd(i32::from(day.year()), month, first);
    params.not_after = rcgen::date_time_ymd(i32::from(day.year()) + YEARS, month, first);
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok(Identity {
        certificate: certificate.pem(),
        key: key.serialize_pem().into(),
    })
}

/// Has a server trust `identity`, by a one-time token; returns the fingerprint of the server. `addresses` are
/// `https://host:port`; when empty those in the token are used. Fine to repeat after a success whose answer was lost.
pub async fn join(
    addresses: &[String],
    token: &SecretString,
    name: &str,
    identity: &Identity,
) -> Result<String, TrustError> {
    let read = parse_token(token)?;
    let given = |a: &String| {
        if a.contains("://") {
            a.clone()
        } else {
            format!("https://{a}")
        }
    };
    let addresses = if addresses.is_empty() {
        &read.addresses
    } else {
        addresses
    };
    let endpoint = Endpoint {
        addresses: addresses.iter().map(given).collect(),
        peer_address: None,
        identity: identity.clone(),
        trust: ServerTrust::Fingerprint(read.fingerprint.clone()),
    };
    // without the header that would have a stranger refused at /1.0
    let server = HttpServer::new(&endpoint, false)?;
    let look = Call::get(RequestClass::Trust, "/1.0", "read the server");
    let (before, _) = server.read::<ServerWire>(&look).await?;
    if before.auth == "trusted" {
        return Ok(read.fingerprint);
    }
    let field = token_field(&before.api_extensions);
    let call = Call::new(
        Method::POST,
        RequestClass::Trust,
        "/1.0/certificates".to_owned(),
        "join the trust store",
    )
    .body(json!({ "type": "client", "name": name, field: token.expose_secret().trim() }));
    if let Answer::Error { code, text, .. } = server.ask::<IgnoredAny>(&call).await? {
        let kind = crate::failure::kind_of_answer(code, &text);
        return Err(server.error(&call, kind, text).into());
    }
    Ok(read.fingerprint)
}

/// The field that takes the token. A stranger is not told which product this is, but what it can do: Incus since 7.0 says
/// nothing at all, older Incus has an extension that LXD never had, LXD with its own field for tokens announces it.
fn token_field(extensions: &[String]) -> &'static str {
    let has = |name: &str| extensions.iter().any(|e| e == name);
    let by_token = extensions.is_empty() || has("explicit_trust_token") || has("clustering_evacuation_stop_options");
    if by_token { "trust_token" } else { "password" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_gives_the_fingerprint_to_pin() {
        let json = r#"{"client_name":"berth","fingerprint":"AB12","addresses":["10.0.0.1:8443"],"secret":"s",
            "expires_at":"0001-01-01T00:00:00Z"}"#;
        let token = parse_token(&STANDARD.encode(json).into()).unwrap();
        assert_eq!(
            (token.fingerprint.as_str(), token.addresses.len(), token.expires_at),
            ("ab12", 1, None)
        );
        assert!(matches!(
            parse_token(&"%%%".to_owned().into()),
            Err(TrustError::Token(_))
        ));
        assert!(matches!(
            parse_token(&STANDARD.encode("{}").into()),
            Err(TrustError::Token(_))
        ));
    }
}
