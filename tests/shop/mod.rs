//! A platform team's Git repository with two servers and some placements: the manifests of `examples/`, with this lab's addresses.
//!
//! What the controller says to the servers goes through proxies, so that a move can be held and its first request be timed.
#![allow(dead_code, reason = "each suite uses its part")]

pub mod argo;
pub mod flux;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use berth_tests::{AuditEvent, Fate, GitOps, Proxy, Repository, SOON, Seen, Test, example, wait_for};

/// Counts shops: each has a repository of its own.
static SHOPS: AtomicUsize = AtomicUsize::new(0);

/// Who applies what is in Git.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Flux.
    Flux,
    /// Argo CD.
    Argo,
}

impl Way {
    /// The folder of `examples/` with what lies in Git.
    fn folder(self) -> &'static str {
        match self {
            Way::Flux => "flux/shop",
            Way::Argo => "argocd/shop",
        }
    }

    /// Says `User-Agent`.
    fn agent(self) -> &'static str {
        match self {
            Way::Flux => "kustomize-controller",
            Way::Argo => "argo",
        }
    }

    /// The first placement of the examples under another name, to another server, with more lines in its spec.
    pub fn placement(self, name: &str, server: &str, more: &str) -> String {
        let both = example(&format!("{}/placements.yaml", self.folder()), &[("web-1", name)]);
        let (first, _) = both.split_once("\n---").unwrap_or((&both, ""));
        let from = "target: {server: rack-a}";
        assert!(first.contains(from), "the examples have changed: {first}");
        let target = format!("target: {{server: {server}}}");
        format!("{}\n{more}---\n", first.replace(from, &target))
    }
}

/// The repository and the servers.
pub struct Shop {
    repository: Repository,
    proxies: Vec<Proxy>,
    way: Way,
}

impl Shop {
    /// The repository with the servers `rack-a` (i1) and `rack-b` (i2) and these placements, and the Secret that is not in it.
    pub async fn new(test: &Test, gitops: &GitOps, way: Way, placements: &str) -> Shop {
        test.add_client_secret("berth-client").await;
        let name = format!("{}-{}", test.namespace(), SHOPS.fetch_add(1, Ordering::Relaxed));
        let repository = gitops.repository(&name).await;
        let mut proxies = Vec::new();
        let mut replaced = Vec::new();
        for (lab, address, fingerprint) in [
            (
                "i1",
                "https://10.0.0.11:8443",
                "4f7c2b1d9a3e58606172839405a6b7c8d9eaf0b1c2d3e4f5061728394a5b6c7d",
            ),
            (
                "i2",
                "https://10.0.0.12:8443",
                "91b0e6d3c5a7f8091a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f7081",
            ),
        ] {
            let server = test.lab().server(lab);
            let proxy = Proxy::start(test.lab(), server).await;
            let addresses = format!("addresses: [\"{}\"]\n  peerAddress: {}", proxy.url(), server.url);
            replaced.push((format!("addresses: [\"{address}\"]"), addresses));
            replaced.push((fingerprint.to_owned(), server.fingerprint.clone()));
            proxies.push(proxy);
        }
        let replaced: Vec<(&str, &str)> = replaced.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        let folder = way.folder();
        let mut files = vec![("shop/placements.yaml", placements.to_owned())];
        files.push((
            "shop/servers.yaml",
            example(&format!("{folder}/servers.yaml"), &replaced),
        ));
        if way == Way::Flux {
            files.push((
                "shop/kustomization.yaml",
                example(&format!("{folder}/kustomization.yaml"), &[]),
            ));
        }
        let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
        repository.commit("The shop", &files).await;
        Shop {
            repository,
            proxies,
            way,
        }
    }

    /// Where the repository is fetched.
    pub fn url(&self) -> &str {
        self.repository.url()
    }

    /// Commits other placements; the commit's id.
    pub async fn commit(&self, message: &str, placements: &str) -> String {
        self.repository
            .commit(message, &[("shop/placements.yaml", placements)])
            .await
    }

    /// Takes the last commit back.
    pub async fn revert(&self) -> String {
        self.repository.revert().await
    }

    /// The newest commit's id.
    pub async fn head(&self) -> String {
        self.repository.head().await
    }

    /// Holds every request that makes a copy: a move goes no further.
    pub fn hold(&self) {
        for proxy in &self.proxies {
            proxy.rule(|seen| {
                if seen.method == "POST" && seen.path == "/1.0/instances" {
                    Fate::Hold
                } else {
                    Fate::Pass
                }
            });
        }
    }

    /// Waits until one is held.
    pub async fn held(&self) {
        wait_for("a move to be held", SOON, || async {
            let held: usize = self.proxies.iter().map(Proxy::held).sum();
            if held > 0 { Ok(()) } else { Err("none is".to_owned()) }
        })
        .await;
    }

    /// Lets moves go on.
    pub async fn release(&self) {
        for proxy in &self.proxies {
            proxy.rule(|_| Fate::Pass);
            proxy.release().await;
        }
    }

    /// Commits that `name` belongs on `server` and times the first request about it. `pushed` is called when the commit is there.
    pub async fn measure<F>(&self, test: &Test, name: &str, server: &str, pushed: impl FnOnce() -> F) -> Measured
    where
        F: Future<Output = ()>,
    {
        self.commit("one field", &self.way.placement(name, server, "")).await;
        let (begun, clock) = (Instant::now(), SystemTime::now());
        pushed().await;
        let about = |seen: &Seen| seen.at >= begun && (seen.path.contains(name) || seen.body.contains(name));
        let first = wait_for("the first request", SOON, || async {
            let seen = self.proxies.iter().flat_map(Proxy::seen);
            seen.filter(about)
                .map(|seen| seen.at)
                .min()
                .ok_or_else(|| "none".to_owned())
        })
        .await;
        let applied = wait_for("the write in the audit log", SOON, || async {
            let writes = test.kube().writes();
            let write = writes.iter().filter(|w| self.is_apply(test, w, name));
            let times = write.filter_map(|w| w.received.parse::<jiff::Timestamp>().ok());
            let after = times.filter_map(|t| SystemTime::from(t).duration_since(clock).ok());
            after.min().ok_or_else(|| "not there yet".to_owned())
        })
        .await;
        let total = first.saturating_duration_since(begun);
        Measured {
            total,
            berth: total.saturating_sub(applied),
        }
    }

    fn is_apply(&self, test: &Test, write: &AuditEvent, name: &str) -> bool {
        let object = &write.object_ref;
        object.resource == "instanceplacements"
            && object.subresource.is_empty()
            && object.namespace == test.namespace()
            && object.name == name
            && write.user_agent.contains(self.way.agent())
            && !write.request_uri.contains("dryRun")
    }
}

/// How long it took from a commit to the first request about the instance at a server.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// From the push.
    pub total: Duration,
    /// From the moment in which the API server was sent the placement: what Berth takes of it.
    pub berth: Duration,
}
