//! A look inside a running container, by what both products offer for that: a program that is run in it, a file that is
//! read. Nothing is changed in there.

use std::time::Duration;

use berth_core::model::{Inside, InstanceRef};
use berth_core::server::{FailureKind, Result};
use reqwest::Method;
use serde::de::IgnoredAny;
use serde_json::json;

use crate::answer::Answer;
use crate::http::{Call, HttpServer};
use crate::observe::RequestClass;
use crate::operations::OperationWire;
use crate::path;

/// What such a program may take at most.
const RUN: Duration = Duration::from_secs(20);
/// Where systemd says that it is the one that started everything.
const SYSTEMD: &str = "/run/systemd/system";

impl HttpServer {
    pub(crate) async fn look_inside(&self, at: &InstanceRef) -> Result<Inside> {
        let owns = match self.run(at, &["test", "-O", "/"]).await? {
            Some(0) => Some(true),
            Some(1) => Some(false),
            _ => None,
        };
        let answers = owns.is_some() || self.run(at, &["true"]).await? == Some(0);
        // Incus 7 cannot read files of a container that was restored
        let owner = self.file(at, "/").await?.and_then(|owner| owner);
        let by_file = owner.map(|uid| uid == 0);
        Ok(Inside {
            answers,
            owns_root: match (owns, by_file) {
                (Some(program), Some(file)) => Some(program && file),
                (program, file) => program.or(file),
            },
            systemd: self.file(at, SYSTEMD).await?.is_some(),
        })
    }

    /// Runs a program and waits for its end; its exit code, or `None` if it could not be run.
    async fn run(&self, at: &InstanceRef, command: &[&str]) -> Result<Option<i64>> {
        let body = json!({
            "command": command,
            "environment": {},
            "interactive": false,
            "record-output": false,
            "wait-for-websocket": false,
        });
        let attempted = format!("run {} in {at}", command.join(" "));
        let path = path::instance(at, "/exec");
        let call = Call::new(Method::POST, RequestClass::Inside, path, attempted.clone()).body(body);
        let (operation, _) = self.begin(&call).await?;
        let path = format!(
            "/1.0/operations/{}/wait?timeout={}",
            path::encode(&operation.0),
            RUN.as_secs()
        );
        let call = Call::get(RequestClass::Inside, path, attempted).within(RUN + Duration::from_secs(10));
        match self.ask::<OperationWire>(&call).await? {
            Answer::Sync {
                metadata: Some(wire), ..
            } => Ok(wire.exit_code()),
            Answer::Sync { .. } | Answer::Async { .. } => {
                Err(self.error(&call, FailureKind::Protocol, "no operation in the answer"))
            }
            Answer::Error {
                status: status @ (401 | 403 | 404 | 502 | 503 | 504),
                text,
                ..
            } => Err(self.refusal(&call, status, text).await),
            // older servers say so that the program could not be run
            Answer::Error { .. } => Ok(None),
        }
    }

    /// The owner of a file, if it is there and can be read at all; of one whose owner is not told, nothing.
    async fn file(&self, at: &InstanceRef, file: &str) -> Result<Option<Option<u32>>> {
        let path = path::with_query(path::instance(at, "/files"), "path", file);
        let call = Call::get(RequestClass::Inside, path, format!("read {file} of {at}"));
        let raw = self.send(&call).await?;
        match raw.status {
            200 => Ok(Some(raw.owner)),
            status @ (401 | 403 | 502 | 503 | 504) => {
                let text = match crate::answer::open::<IgnoredAny>(&raw) {
                    Ok(Answer::Error { text, .. }) => text,
                    Ok(_) | Err(_) => String::new(),
                };
                Err(self.refusal(&call, status, text).await)
            }
            _ => Ok(None),
        }
    }
}
