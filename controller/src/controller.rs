//! `berth controller` from start to end. A process that lost its lease forgets everything and takes part anew, as if it
//! had been started again: what it had in hand is somebody else's now.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use berth_engine::{Engine, Env, Scratch};
use jiff::Timestamp;
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::admin::{self, Shown};
use crate::cli::{Fatal, Options};
use crate::cluster::{self, Cluster};
use crate::lease::{self, Election, Leadership};
use crate::metrics::Metrics;
use crate::placements::Placements;
use crate::records::KubeRecords;
use crate::report::Writes;
use crate::scratch::Folder;
use crate::servers::Servers;
use crate::store::{Gate, Store};
use crate::telemetry;
use crate::wiring::Wiring;

/// How long the write in hand is waited for at the end.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the installed definitions are looked at again when they do not fit.
const SCHEMA_RETRY: Duration = Duration::from_secs(10);

/// Pause before everything is started anew after a part of it broke off.
const RESTART: Duration = Duration::from_secs(5);

/// Runs the controller until SIGTERM.
pub(crate) fn main(options: Options) -> Result<(), Fatal> {
    telemetry::init(options.log_format, &options.log_level)?;
    // another part of the program may have chosen already, and there is only this one to choose
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Fatal::new("start the runtime", e))?;
    runtime.block_on(run(options))
}

async fn run(options: Options) -> Result<(), Fatal> {
    let cluster = cluster::connect(&options).await?;
    let shown = Shown::new(Metrics::new());
    let mut stop = stop_signal()?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), namespaces = ?options.namespaces, "starts");
    let admin = tokio::spawn(admin::serve(options.listen_address, shown.clone()));
    let me = Me {
        identity: cluster::identity(),
        scratch: scratch(&options)?,
    };
    while !*stop.borrow() {
        term(&options, &cluster, &me, &shown, &mut stop).await;
    }
    admin.abort();
    tracing::info!("ends");
    Ok(())
}

/// What stays the same as long as the process lives.
struct Me {
    identity: String,
    scratch: Option<Arc<dyn Scratch>>,
}

fn scratch(options: &Options) -> Result<Option<Arc<dyn Scratch>>, Fatal> {
    let Some(dir) = options.scratch_dir.as_ref().filter(|d| !d.as_os_str().is_empty()) else {
        return Ok(None);
    };
    Ok(Some(Arc::new(Folder::open(dir, options.scratch_limit)?)))
}

/// Turns true with SIGTERM or SIGINT.
fn stop_signal() -> Result<watch::Receiver<bool>, Fatal> {
    let failed = |e| Fatal::new("listen for signals", e);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        sender.send_replace(true);
    });
    Ok(receiver)
}

/// Takes part until the lease is lost or the process is to end.
///
/// The identity is that of the process: if nobody else has taken the lease since, it goes on at once.
async fn term(options: &Options, cluster: &Cluster, me: &Me, shown: &Arc<Shown>, stop: &mut watch::Receiver<bool>) {
    let leadership = Leadership::none();
    let gate = Gate::new(leadership.clone());
    let namespaces = scopes(options);
    let store = Store::new(cluster.client.clone(), gate.clone(), shown.metrics(), namespaces.len());
    let wiring = assemble(&store, me);
    shown.ready.store(false, Ordering::SeqCst);
    shown.refresh_with(Some(Box::new({
        let wiring = wiring.clone();
        move |metrics| wiring.refresh(metrics)
    })));
    shown.moves_from(Some(Box::new({
        let wiring = wiring.clone();
        move |namespace, name| wiring.open_move(namespace, name)
    })));
    let mut running = tokio::spawn(wiring.run(namespaces));
    let election = match options.leader_elect {
        false => None,
        true => Some(Election {
            namespace: cluster::lease_namespace(cluster, options).await,
            name: options.lease_name.clone(),
            identity: me.identity.clone(),
        }),
    };
    let lead = async {
        store.synced().await;
        shown.ready.store(true, Ordering::SeqCst);
        schema_fits(&cluster.client).await;
        match &election {
            Some(election) => lease::run(cluster.client.clone(), election, &leadership).await,
            None => {
                leadership.take_for_good();
                std::future::pending::<()>().await;
            }
        }
    };
    let stops = tokio::select! {
        () = lead => false,
        // without its parts this process would lead and do nothing
        _ = &mut running => {
            sleep(RESTART).await;
            false
        }
        _ = stop.wait_for(|stop| *stop) => true,
    };
    // nothing is begun any more, and the write in hand is finished, before another controller may lead
    gate.close(PATIENCE).await;
    running.abort();
    shown.refresh_with(None);
    shown.moves_from(None);
    if let Some(election) = election.filter(|_| stops && leadership.may_act()) {
        lease::release(cluster.client.clone(), &election, &leadership).await;
    }
}

fn scopes(options: &Options) -> Vec<Option<String>> {
    let mut named: Vec<String> = options.namespaces.iter().filter(|n| !n.is_empty()).cloned().collect();
    named.sort();
    named.dedup();
    match named.is_empty() {
        true => vec![None],
        false => named.into_iter().map(Some).collect(),
    }
}

/// Everything of one term, connected but not running.
fn assemble(store: &Arc<Store>, me: &Me) -> Wiring {
    let records = Arc::new(KubeRecords::new(store.clone()));
    let (may_act, is_safe) = (store.gate.clone(), store.gate.clone());
    let env = Env {
        clock: Arc::new(Timestamp::now),
        may_act: Arc::new(move || may_act.may_act()),
        lease_is_safe: Arc::new(move || is_safe.is_safe()),
        scratch: me.scratch.clone(),
    };
    let engine = Arc::new(Engine::new(env, records.clone()));
    let servers = Servers::new(store.clone(), engine.clone(), records.clone(), me.identity.clone());
    let placements = Arc::new(Placements {
        store: store.clone(),
        engine: engine.clone(),
        records,
        identity: me.identity.clone(),
        writes: Writes::default(),
    });
    Wiring::new(store.clone(), engine, servers, placements)
}

/// Waits until the installed definitions fit: with older ones what we write would be pruned.
async fn schema_fits(client: &Client) {
    let mut said = String::new();
    while let Err(problem) = cluster::check_schema(client).await {
        if problem != said {
            tracing::error!("does not lead: {problem}");
            said = problem;
        }
        sleep(SCHEMA_RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn each_namespace_is_watched_once_and_none_means_all() {
        let scopes = |line: &[&str]| scopes(&Line::parse_from(line).options);
        assert_eq!(scopes(&["berth"]), [None]);
        let two = scopes(&["berth", "--namespace=b,a", "--namespace=b,"]);
        assert_eq!(two, [Some("a".to_owned()), Some("b".to_owned())]);
    }
}
