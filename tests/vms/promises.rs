//! What the decisions take for granted about virtual machines, of the real servers.

use async_trait::async_trait;
use berth_core::model::Product;
use berth_core::server::Server;
use berth_tests::{NewVm, Test};
use serde_json::json;

use super::guests::{self, Guest, Guests};
use super::servers::{Real, client};

#[async_trait]
impl Guests for Real {
    async fn make_guest(&self, name: &str, guest: Guest) {
        let lab = self.test.lab();
        let server = guest.member.map_or(self.servers[0].0, |member| lab.server(member));
        let new = NewVm {
            stateful: guest.stateful,
            start: false,
            member: guest.member.map(str::to_owned),
            ..NewVm::default()
        };
        lab.create_vm(server, name, &new).await;
        if guest.running {
            server.set_state(name, "start").await;
        }
        if guest.running && guest.stateful {
            // LXD restores one that still booted, and then it reboots
            lab.wait_ticking(name).await;
        }
    }

    async fn save(&self, name: &str) -> Result<(), String> {
        let stop = json!({"action": "stop", "stateful": true, "timeout": -1, "force": false});
        let path = format!("/1.0/instances/{name}/state");
        let stopped = self.servers[0].0.call("PUT", &path, stop).await;
        stopped.map(drop).map_err(|error| error.to_string())
    }

    fn cluster(&self) -> Option<Box<dyn Server>> {
        let incus = self.servers[0].0.product == berth_tests::Product::Incus;
        incus.then(|| -> Box<dyn Server> { Box::new(client(&self.test, &["m1", "m2"], None)) })
    }
}

macro_rules! all_of {
    ($($check:ident),* $(,)?) => {
        async fn keeps(world: &Real) {
            $(
                guests::$check(world).await;
                eprintln!("{:?}: {}", world.servers[0].0.product, stringify!($check));
            )*
        }
    };
}

crate::every_guest_check!(all_of);

pub async fn incus_servers_do_with_guests_what_is_taken_for_granted(test: Test) {
    keeps(&Real::new(test, Product::Incus)).await;
}

pub async fn lxd_servers_do_with_guests_what_is_taken_for_granted(test: Test) {
    keeps(&Real::new(test, Product::Lxd)).await;
}
