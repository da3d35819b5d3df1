//! From what went wrong (no connection, a cut, an error body) to the kind of failure that the decisions branch on.
//! The only place that looks at error texts.

use std::error::Error as StdError;
use std::io;

use berth_core::server::FailureKind;
use rustls::{AlertDescription, CertificateError};

/// Kind of an error answer. The servers answer most refusals with 500 and only a text, so four things must be read in it:
/// `Instance is busy running` (worth another try soon), a taken name (500 on Incus and LXD 5, 409 on LXD 6), that a change
/// needs a stop, and that the server does not reach the other end of a transfer (LXD 5 dials in the request itself).
/// A 403 is `Refused` here; whether it is our certificate is found out by asking for `/1.0`.
pub(crate) fn kind_of_answer(code: u16, text: &str) -> FailureKind {
    let busy = text.contains("Instance is busy running");
    let taken = text.contains("already exists") || text.contains("UNIQUE constraint failed");
    match code {
        401 => FailureKind::NotTrusted,
        404 => FailureKind::NotFound,
        409 => FailureKind::AlreadyExists,
        412 => FailureKind::Changed,
        // a daemon that starts or shuts down refuses before it does anything
        503 => FailureKind::Unreachable,
        // a proxy on the way does not know what became of the request
        502 | 504 => FailureKind::Unknown,
        _ if text.contains("dial tcp") || text.contains("Unable to connect to:") => FailureKind::PeerUnreachable,
        _ if busy => FailureKind::Busy,
        _ if taken => FailureKind::AlreadyExists,
        _ if needs_stop(text) => FailureKind::Running,
        _ => FailureKind::Refused,
    }
}

/// Whether a change is refused only because the instance runs: a key of a virtual machine, a device that cannot be
/// plugged, a disk in use.
fn needs_stop(text: &str) -> bool {
    const WORDS: [&str; 4] = [
        "when VM is running",
        "the VM is running",
        "when instance is running",
        "while instance is running",
    ];
    WORDS.iter().any(|words| text.contains(words)) || text.ends_with(": In use") || text == "In use"
}

/// Whether an error text of `/wait` says that the time asked for is over, rather than that the operation failed.
pub(crate) fn is_deadline(text: &str) -> bool {
    text.ends_with("context deadline exceeded") && !text.contains(':')
}

/// How a request ended without an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) kind: FailureKind,
    pub(crate) message: String,
    /// True if no byte of the request can have reached the server.
    pub(crate) unsent: bool,
    /// True if a deadline passed.
    pub(crate) timed_out: bool,
}

impl Cut {
    /// From an error of the HTTP library.
    pub(crate) fn of_http(error: reqwest::Error) -> Self {
        let unsent = error.is_connect() || error.is_builder();
        let timed_out = error.is_timeout();
        let error = error.without_url();
        let kind = tls_kind(&error).unwrap_or(if unsent {
            FailureKind::Unreachable
        } else {
            FailureKind::Unknown
        });
        Self {
            kind,
            message: chain(&error),
            unsent,
            timed_out,
        }
    }

    /// No connection came about in time.
    pub(crate) fn late_connection() -> Self {
        Self {
            kind: FailureKind::Unreachable,
            message: "no connection in time".to_owned(),
            unsent: true,
            timed_out: true,
        }
    }

    /// From an error while a connection is made.
    pub(crate) fn while_connecting(error: &(dyn StdError + 'static)) -> Self {
        let kind = tls_kind(error).unwrap_or(FailureKind::Unreachable);
        Self {
            kind,
            message: chain(error),
            unsent: true,
            timed_out: false,
        }
    }
}

/// Why there is no websocket.
pub(crate) enum Refusal {
    /// The server's answer: status and words.
    Answer(u16, String),
    /// No answer.
    Cut(Cut),
}

impl From<Cut> for Refusal {
    fn from(cut: Cut) -> Self {
        Refusal::Cut(cut)
    }
}

/// An error with all its causes, each once.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(e) = next {
        let text = text_of(e);
        if !parts.iter().any(|p| p.contains(&text)) {
            parts.push(text);
        }
        next = cause(e);
    }
    parts.join(": ")
}

/// What an error says; TLS shows what our own check of a certificate said as code.
fn text_of(error: &(dyn StdError + 'static)) -> String {
    match error.downcast_ref::<rustls::Error>() {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(own))) => own.0.to_string(),
        Some(_) | None => error.to_string(),
    }
}

/// The cause of an error; an `io::Error` hides the error it wraps from `source`.
fn cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}

/// `Some` if TLS says whose certificate is at fault.
fn tls_kind(error: &(dyn StdError + 'static)) -> Option<FailureKind> {
    let mut next = Some(error);
    while let Some(e) = next {
        match e.downcast_ref::<rustls::Error>() {
            Some(rustls::Error::InvalidCertificate(_)) => return Some(FailureKind::CertificateMismatch),
            Some(rustls::Error::AlertReceived(alert)) if about_our_certificate(*alert) => {
                return Some(FailureKind::NotTrusted);
            }
            _ => next = cause(e),
        }
    }
    None
}

fn about_our_certificate(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_name_and_a_busy_instance_are_told_apart_from_other_refusals() {
        let kind = |text| kind_of_answer(500, text);
        assert_eq!(
            kind(r#"Failed creating instance record: This "instances" entry already exists"#),
            FailureKind::AlreadyExists
        );
        assert_eq!(
            kind("UNIQUE constraint failed: instances.project_id, instances.name"),
            FailureKind::AlreadyExists
        );
        assert_eq!(
            kind(r#"Instance is busy running a "migrate" operation"#),
            FailureKind::Busy
        );
        assert_eq!(kind("Instance is running"), FailureKind::Refused);
        assert_eq!(
            kind(r#"Key "migration.stateful" cannot be updated when VM is running"#),
            FailureKind::Running
        );
        assert_eq!(kind_of_answer(412, "ETag doesn't match: a vs b"), FailureKind::Changed);
    }

    #[test]
    fn a_stop_that_timed_out_is_no_expired_wait() {
        assert!(is_deadline("context deadline exceeded"));
        assert!(!is_deadline(
            r#"Failed shutting down instance, status is "Running": context deadline exceeded"#
        ));
    }
}
