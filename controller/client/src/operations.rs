//! Background operations: their objects, states, progress strings, the list by status and `/wait` in all its variants
//! (fact sheet 10). An operation is a hint; what happened is read from the instances.

use std::collections::BTreeMap;
use std::time::Duration;

use berth_core::model::InstanceRef;
use berth_core::server::{FailureKind, Operation, OperationId, OperationState, Progress, Result};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::answer::Answer;
use crate::failure::is_deadline;
use crate::http::{Call, HttpServer};
use crate::observe::RequestClass;
use crate::path;
use crate::wire::nullable;

#[derive(Deserialize)]
pub(crate) struct OperationWire {
    id: String,
    #[serde(default)]
    class: String,
    #[serde(default)]
    description: String,
    #[serde(default)]
    status_code: i64,
    #[serde(default, deserialize_with = "nullable")]
    resources: BTreeMap<String, Option<Vec<String>>>,
    #[serde(default, deserialize_with = "nullable")]
    metadata: Map<String, Value>,
    #[serde(default, deserialize_with = "nullable")]
    err: String,
}

impl OperationWire {
    /// Join tokens are operations, too, but nothing runs.
    pub(crate) fn is_work(&self) -> bool {
        self.class != "token"
    }

    /// The exit code of a program that was run, if its end is known.
    pub(crate) fn exit_code(&self) -> Option<i64> {
        self.metadata.get("return").and_then(Value::as_i64)
    }

    pub(crate) fn state(&self) -> OperationState {
        let words = |otherwise: &str| {
            if self.err.is_empty() {
                otherwise.to_owned()
            } else {
                self.err.clone()
            }
        };
        match self.status_code {
            200 => OperationState::Succeeded,
            400 => OperationState::Failed(words("the server gave no reason")),
            401 => OperationState::Failed(words("the operation was cancelled")),
            _ => OperationState::Running,
        }
    }

    /// The websocket secrets: these three names only, newer servers put other things beside them.
    pub(crate) fn secrets(&self) -> BTreeMap<String, SecretString> {
        ["control", "fs", "criu"]
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), self.metadata.get(name)?.as_str()?.into())))
            .collect()
    }

    /// `project` counts for resources whose URL names none.
    pub(crate) fn into_model(self, project: &str) -> Operation {
        let instances = self.instances(project);
        let progress = progress(&self.metadata);
        Operation {
            id: OperationId(self.id),
            description: self.description,
            instances,
            progress,
        }
    }

    fn instances(&self, project: &str) -> Vec<InstanceRef> {
        let entity = self.metadata.get("entity_url").and_then(Value::as_str);
        let urls = self
            .resources
            .values()
            .flatten()
            .flatten()
            .map(String::as_str)
            .chain(entity);
        let mut instances: Vec<InstanceRef> = urls.filter_map(|url| path::instance_of(url, project)).collect();
        instances.sort();
        instances.dedup();
        instances
    }
}

/// Progress from an operation's metadata: strings for people under `*_progress`, in newer places also numbers.
fn progress(metadata: &Map<String, Value>) -> Option<Progress> {
    let text = metadata
        .iter()
        .filter(|(key, _)| key.ends_with("_progress"))
        .filter_map(|(_, v)| v.as_str());
    let mut found = text.filter_map(parse_progress).next_back();
    if let Some(Value::Object(numbers)) = metadata.get("progress") {
        let number = |key: &str| match numbers.get(key) {
            Some(Value::String(s)) => s.parse().ok(),
            Some(Value::Number(n)) => n.as_i64(),
            _ => None,
        };
        let known = found.get_or_insert_default();
        known.bytes = number("processed").unwrap_or(known.bytes);
        known.bytes_per_second = number("speed").unwrap_or(known.bytes_per_second);
        known.percent = number("percent").and_then(|p| i32::try_from(p).ok()).or(known.percent);
    }
    found
}

/// Reads `37.06MB (11.97MB/s)`, `web-1: 37.06MB (11.97MB/s)` and `web-1: 45% (11.97MB/s)`.
fn parse_progress(text: &str) -> Option<Progress> {
    let text = text.rsplit_once(": ").map_or(text, |(_, rest)| rest).trim();
    let (done, speed) = text.split_once(" (").unwrap_or((text, ""));
    let speed = speed.trim_end_matches(')').trim_end_matches("/s");
    let bytes_per_second = parse_bytes(speed).unwrap_or(0);
    match done.strip_suffix('%') {
        Some(percent) => Some(Progress {
            bytes: 0,
            bytes_per_second,
            percent: Some(percent.trim().parse().ok()?),
        }),
        None => Some(Progress {
            bytes: parse_bytes(done)?,
            bytes_per_second,
            percent: None,
        }),
    }
}

/// Reads `12B`, `37.06MB` (powers of 1000) and `1.5GiB`.
fn parse_bytes(text: &str) -> Option<i64> {
    let split = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = (text[..split].trim().parse::<f64>().ok()?, text[split..].trim());
    let factor = match unit {
        "B" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "PB" => 1e15,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        "TiB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    // the conversion saturates; nobody moves more than i64::MAX bytes
    Some((number * factor).round() as i64)
}

impl HttpServer {
    /// The operations that run now, of all projects.
    pub(crate) async fn running_operations(&self) -> Result<Vec<Operation>> {
        let extensions = self.extensions().await?;
        if extensions.contains("operations_get_query_all_projects") {
            return self
                .operations_at("/1.0/operations?recursion=1&all-projects=true".to_owned(), "default")
                .await;
        }
        let mut all = Vec::new();
        for project in self.project_names().await? {
            let path = path::with_query("/1.0/operations?recursion=1".to_owned(), "project", &project);
            all.extend(self.operations_at(path, &project).await?);
        }
        // some versions answer with all projects whichever was asked for
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all.dedup_by(|a, b| a.id == b.id);
        Ok(all)
    }

    async fn operations_at(&self, path: String, project: &str) -> Result<Vec<Operation>> {
        let call = Call::get(RequestClass::Operations, path, "list the operations");
        let by_status: BTreeMap<String, Option<Vec<OperationWire>>> = self.list(&call).await?;
        let all = by_status.into_values().flatten().flatten();
        let running = all.filter(|o| o.is_work() && o.state() == OperationState::Running);
        Ok(running.map(|o| o.into_model(project)).collect())
    }

    /// Waits at most `timeout` for the end of an operation.
    pub(crate) async fn wait_for(&self, operation: &OperationId, timeout: Duration) -> Result<OperationState> {
        // part of a second counts as a whole one, so that a short wait is one nevertheless
        let seconds = timeout.as_secs() + u64::from(timeout.subsec_nanos() > 0);
        if seconds == 0 {
            return self.look_at(operation).await;
        }
        let path = format!("/1.0/operations/{}/wait?timeout={seconds}", path::encode(&operation.0));
        let call = Call::get(RequestClass::Wait, path, format!("wait for operation {operation}"))
            .within(Duration::from_secs(seconds + 10));
        match self.ask::<OperationWire>(&call).await? {
            Answer::Sync {
                metadata: Some(wire), ..
            } => Ok(wire.state()),
            Answer::Sync { .. } | Answer::Async { .. } => {
                Err(self.error(&call, FailureKind::Protocol, "no operation in the answer"))
            }
            Answer::Error { status: 404, .. } => Ok(OperationState::Gone),
            Answer::Error {
                status: status @ (401 | 403 | 502 | 503 | 504),
                text,
                ..
            } => Err(self.refusal(&call, status, text).await),
            // The operation failed, or our time is over: older servers say both in this way. The operation itself knows.
            Answer::Error { text, .. } => Ok(match self.look_at(operation).await? {
                OperationState::Gone if !is_deadline(&text) => OperationState::Failed(text),
                state => state,
            }),
        }
    }

    async fn look_at(&self, operation: &OperationId) -> Result<OperationState> {
        let path = format!("/1.0/operations/{}", path::encode(&operation.0));
        let call = Call::get(RequestClass::Wait, path, format!("look at operation {operation}"));
        match self.ask::<OperationWire>(&call).await? {
            Answer::Sync {
                metadata: Some(wire), ..
            } => Ok(wire.state()),
            Answer::Sync { .. } | Answer::Async { .. } => {
                Err(self.error(&call, FailureKind::Protocol, "no operation in the answer"))
            }
            Answer::Error { code: 404, .. } => Ok(OperationState::Gone),
            Answer::Error { code, text, .. } => Err(self.refusal(&call, code, text).await),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_strings_of_both_products_are_read() {
        let bytes = |bytes, bytes_per_second| {
            Some(Progress {
                bytes,
                bytes_per_second,
                percent: None,
            })
        };
        assert_eq!(parse_progress("37.06MB (11.97MB/s)"), bytes(37_060_000, 11_970_000));
        assert_eq!(parse_progress("web-1: 512B (3kB/s)"), bytes(512, 3000));
        assert_eq!(
            parse_progress("Unpack: 45% (131.07GB/s)"),
            Some(Progress {
                bytes: 0,
                bytes_per_second: 131_070_000_000,
                percent: Some(45)
            })
        );
        assert_eq!(parse_progress(""), None);
        assert_eq!(parse_progress("Stopping instance"), None);
    }

    #[test]
    fn numbers_beside_the_progress_string_win() {
        let metadata: Map<String, Value> = serde_json::from_str(
            r#"{"fs_progress":"web-1: 1.00kB (2B/s)","progress":{"processed":"1024","speed":"3","stage":"fs"}}"#,
        )
        .unwrap();
        assert_eq!(
            progress(&metadata),
            Some(Progress {
                bytes: 1024,
                bytes_per_second: 3,
                percent: None
            })
        );
    }
}
