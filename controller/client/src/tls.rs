//! TLS with servers whose certificates are self-signed and never match the address: the end-entity certificate itself is
//! pinned, and the handshake signature is verified as ever. Public roots are an explicit choice.

use std::error::Error as StdError;
use std::fmt;
use std::sync::{Arc, Mutex};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};

/// Who we are to a server: client certificate and key, PEM.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate, PEM.
    pub certificate: String,
    /// Its private key, PEM.
    pub key: SecretString,
}

/// How a server proves that it is the one we mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerTrust {
    /// SHA-256 of its certificate in hex (upper or lower case, with or without colons).
    Fingerprint(String),
    /// Its certificate, PEM.
    Pem(String),
    /// A certificate that this machine's root certificates vouch for, for the name in the address.
    SystemRoots,
}

/// Why no connection can be made at all, whoever answers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// No address, or one that is no `https://host:port`.
    #[error("server address {address:?}: {reason}")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The client certificate cannot be read.
    #[error("client certificate: {0}")]
    ClientCertificate(String),
    /// The client key cannot be read, or does not belong to the certificate.
    #[error("client key: {0}")]
    ClientKey(String),
    /// The pinned server certificate or fingerprint cannot be read.
    #[error("pinned server certificate: {0}")]
    ServerCertificate(String),
    /// This machine's root certificates cannot be read.
    #[error("root certificates of this machine: {0}")]
    Roots(String),
    /// The TLS or HTTP library refuses its configuration.
    #[error("TLS set-up: {0}")]
    Setup(String),
}

/// The server presented another certificate than the pinned one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PinMismatch {
    pinned: String,
    presented: String,
}

impl fmt::Display for PinMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the server presents the certificate {}, pinned is {}",
            self.presented, self.pinned
        )
    }
}

impl StdError for PinMismatch {}

/// SHA-256 of a certificate (its first one, PEM) in lower-case hex.
pub fn certificate_fingerprint(pem: &str) -> Result<String, ConnectError> {
    match CertificateDer::from_pem_slice(pem.as_bytes()) {
        Ok(der) => Ok(fingerprint_of(&der)),
        Err(e) => Err(ConnectError::ServerCertificate(e.to_string())),
    }
}

fn fingerprint_of(der: &CertificateDer<'_>) -> String {
    use fmt::Write as _;
    Sha256::digest(der)
        .iter()
        .fold(String::with_capacity(64), |mut hex, byte| {
            // writing into a String cannot fail
            let _ = write!(hex, "{byte:02x}");
            hex
        })
}

/// Fingerprint of the certificate that the server presented last.
pub(crate) type Seen = Arc<Mutex<Option<String>>>;

/// TLS configuration for one server, and the place where the presented fingerprint appears.
pub(crate) fn client_config(identity: &Identity, trust: &ServerTrust) -> Result<(ClientConfig, Seen), ConnectError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let seen = Seen::default();
    let verifier = Verifier {
        check: check(trust, &provider)?,
        seen: Arc::clone(&seen),
        provider: Arc::clone(&provider),
    };
    let chain = CertificateDer::pem_slice_iter(identity.certificate.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| ConnectError::ClientCertificate(e.to_string()))?;
    if chain.is_empty() {
        return Err(ConnectError::ClientCertificate(
            "no PEM section CERTIFICATE in it".to_owned(),
        ));
    }
    let key = PrivateKeyDer::from_pem_slice(identity.key.expose_secret().as_bytes())
        .map_err(|e| ConnectError::ClientKey(e.to_string()))?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| ConnectError::Setup(e.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(chain, key)
        .map_err(|e| ConnectError::ClientKey(format!("does not go with the certificate: {e}")))?;
    Ok((config, seen))
}

fn check(trust: &ServerTrust, provider: &Arc<CryptoProvider>) -> Result<Check, ConnectError> {
    match trust {
        ServerTrust::Fingerprint(text) => {
            let hex: String = text
                .chars()
                .filter(|c| *c != ':')
                .collect::<String>()
                .to_ascii_lowercase();
            if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
                let reason = format!("{text:?} is no SHA-256 fingerprint (64 hexadecimal digits)");
                return Err(ConnectError::ServerCertificate(reason));
            }
            Ok(Check::Pin(hex))
        }
        ServerTrust::Pem(pem) => certificate_fingerprint(pem).map(Check::Pin),
        ServerTrust::SystemRoots => {
            let mut roots = RootCertStore::empty();
            let found = rustls_native_certs::load_native_certs();
            let (added, _) = roots.add_parsable_certificates(found.certs);
            if added == 0 {
                let errors: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
                return Err(ConnectError::Roots(format!("none found {}", errors.join(", "))));
            }
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
                .build()
                .map(Check::Roots)
                .map_err(|e| ConnectError::Roots(e.to_string()))
        }
    }
}

#[derive(Debug)]
enum Check {
    Pin(String),
    Roots(Arc<WebPkiServerVerifier>),
}

#[derive(Debug)]
struct Verifier {
    check: Check,
    seen: Seen,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let presented = fingerprint_of(end_entity);
        match &self.check {
            // The validity dates are not looked at: the pin is the whole trust, as with the servers' own clients.
            Check::Pin(pinned) if *pinned != presented => {
                let mismatch = PinMismatch {
                    pinned: pinned.clone(),
                    presented,
                };
                return Err(CertificateError::Other(OtherError(Arc::new(mismatch))).into());
            }
            Check::Pin(_) => {}
            Check::Roots(verifier) => {
                verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
            }
        }
        if let Ok(mut seen) = self.seen.lock() {
            *seen = Some(presented);
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
