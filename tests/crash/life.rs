//! The life of one controller: the real engine on a simulated world, from its start to the end of the move or its death.

use std::sync::Arc;
use std::time::Duration;

use berth_api::server::Limits;
use berth_api::{Outcome, Reason};
use berth_core::moves::{self, StopRules, Wish};
use berth_core::records::{Record, Records};
use berth_core::server::{Data, ServerError};
use berth_engine::drive::{Driver, Orders};
use berth_engine::registry::{Registry, ServerConfig};
use berth_engine::{Env, Key, Scratch};
use berth_sim::{MemoryRecords, World};
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use tokio::sync::Notify;

use crate::scenario::{FIRST, MOVE, NAMESPACE};

/// No move of the table takes longer, whatever happens to it.
const LONGEST: Duration = Duration::from_secs(3 * 3600);

/// How a controller's life ended.
#[derive(Debug)]
pub enum End {
    Finished,
    Died,
    Stuck(String),
}

/// Backups are kept in memory.
struct Memory;

#[async_trait::async_trait]
impl Scratch for Memory {
    async fn keep(&self, data: Data) -> Result<Data, ServerError> {
        let pieces: Vec<Vec<u8>> = data.bytes.try_collect().await?;
        Ok(Data {
            size: data.size,
            bytes: futures::stream::iter([Ok(pieces.concat())]).boxed(),
        })
    }
}

/// Runs controller `id` until the move is over or the controller is dead. What it leaves half done stays half done.
pub async fn live(world: &World, id: &str, interrupt: &Notify) -> End {
    tokio::select! {
        biased;
        () = world.died(id) => End::Died,
        () = carry_on(world, id, interrupt) => End::Finished,
        () = tokio::time::sleep(LONGEST) => {
            let record = world.record(NAMESPACE, MOVE);
            let status = record.map(|r| (r.status.step, r.status.last_error));
            End::Stuck(format!("{status:?}"))
        }
    }
}

/// Carries the move before to its end, in a world that nobody disturbs.
pub async fn first(world: &World) {
    drive(world, "setup", FIRST, &Notify::new()).await;
    let record = world.record(NAMESPACE, FIRST).expect("the record is there");
    assert!(moves::has_kept(&record), "{:?}", record.status);
}

async fn carry_on(world: &World, id: &str, interrupt: &Notify) {
    drive(world, id, MOVE, interrupt).await;
    let over = world.record(NAMESPACE, MOVE);
    // what the move before kept is forgotten when it was used, and stays when it was not
    let used = over.is_some_and(|r| r.status.outcome() == Some(Outcome::Succeeded));
    if used && world.record(NAMESPACE, FIRST).is_some() {
        end_kept(world, id, FIRST, interrupt).await;
    }
    end_kept(world, id, MOVE, interrupt).await;
}

/// Deletes what was kept when its time is over.
async fn end_kept(world: &World, id: &str, name: &str, interrupt: &Notify) {
    let Some(record) = world.record(NAMESPACE, name) else {
        return;
    };
    if let Some(until) = record.status.kept_until.filter(|_| name == MOVE) {
        let left = until.0.duration_since(world.now());
        tokio::time::sleep(left.try_into().unwrap_or_default()).await;
    }
    let (driver, records) = driver(world, id);
    let orders = orders(interrupt);
    loop {
        let again = match Records::load(&records, NAMESPACE, name).await {
            Ok(record) if !moves::has_kept(&record) => return,
            Ok(record) => driver.end_kept(record, &orders).await.map(|d| d.look_again),
            Err(e) => Err(e),
        };
        let after = again.ok().flatten().unwrap_or(Duration::from_secs(1));
        tokio::time::sleep(after).await;
    }
}

fn orders(interrupt: &Notify) -> Orders<'_> {
    Orders {
        wish: &wish,
        open_moves: vec![MOVE.to_owned()],
        interrupt,
        written: &|_| {},
    }
}

fn driver(world: &World, id: &str) -> (Driver, MemoryRecords) {
    let (clock, alive) = (world.clone(), world.clone());
    let name = id.to_owned();
    let env = Env {
        clock: Arc::new(move || clock.now()),
        may_act: Arc::new(move || !alive.is_dead(&name)),
        lease_is_safe: Arc::new(|| true),
        scratch: Some(Arc::new(Memory)),
    };
    let changes = tokio::sync::broadcast::Sender::new(64);
    let registry = Arc::new(Registry::new(env.clone(), changes.clone()));
    for server in ["a", "b"] {
        let config = ServerConfig {
            created_at: Timestamp::UNIX_EPOCH,
            cordoned: false,
            limits: Limits::default(),
            interval: Duration::from_secs(300),
            address: format!("https://{server}"),
            peer_address: None,
            allow_unsafe_overrides: false,
            live_between_servers: true,
        };
        let connection = Arc::new(world.connect(id, server));
        registry.upsert(
            &Key::new(NAMESPACE, server),
            config,
            connection,
            Some(berth_sim::CERTIFICATE.to_owned()),
        );
    }
    let records = Arc::new(world.records(id));
    (Driver::new(env, registry, records, changes), world.records(id))
}

async fn drive(world: &World, id: &str, name: &str, interrupt: &Notify) {
    let (driver, records) = driver(world, id);
    let orders = orders(interrupt);
    loop {
        let again = match Records::load(&records, NAMESPACE, name).await {
            Ok(record) => driver.drive(record, &orders).await.map(|d| d.look_again),
            Err(e) => Err(e),
        };
        match again {
            Ok(None) => return,
            Ok(Some(after)) => {
                tokio::select! {
                    () = tokio::time::sleep(after) => {}
                    () = interrupt.notified() => {}
                }
            }
            Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
        }
    }
}

fn wish(record: &Record, _: Timestamp) -> Wish {
    if record.spec.cancel {
        return Wish::Undo {
            reason: Reason::MoveCancelled,
            message: "the move was cancelled".to_owned(),
        };
    }
    Wish::Continue(StopRules {
        timeout: record.spec.stop.timeout.as_std(),
        force: record.spec.stop.force,
        max_downtime: None,
        preserves_power: false,
    })
}
