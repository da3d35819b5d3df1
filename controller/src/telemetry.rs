//! Log lines: JSON or text on standard output, filtered by a level or by module. Never a secret, never a body.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::{Fatal, LogFormat};

/// Has everything logged from now on.
pub(crate) fn init(format: LogFormat, filter: &str) -> Result<(), Fatal> {
    // the client reports each failed attempt by itself; what comes of them is logged by those who asked
    let whole = format!("kube_client::client::builder=off,{filter}");
    let filter = EnvFilter::try_new(whole).map_err(|e| Fatal::new(&format!("read the log filter {filter:?}"), e))?;
    let registry = tracing_subscriber::registry().with(filter);
    let done = match format {
        LogFormat::Json => registry.with(fmt::layer().json().flatten_event(true)).try_init(),
        LogFormat::Text => registry.with(fmt::layer().with_ansi(false)).try_init(),
    };
    done.map_err(|e| Fatal::new("begin to log", e))
}
