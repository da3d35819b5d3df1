//! The contract of the port on simulated servers: they are no kinder and no stricter than the real ones.

#[path = "contract/mod.rs"]
mod contract;
#[path = "contract/guests.rs"]
mod guests;

use std::time::Duration;

use async_trait::async_trait;
use berth_core::model::Product;
use berth_core::server::Server;
use berth_sim::{Guest, InstanceOptions, Options, SimServer, World as Simulated};
use contract::{New, World};
use guests::Guests;

/// Two servers of one product. The invariants of the move protocol are not looked at: nothing here is a move.
struct Sim {
    world: Simulated,
    product: Product,
    servers: [SimServer; 2],
}

impl Sim {
    fn new(product: Product) -> Self {
        let world = Simulated::new();
        let servers = ["a", "b"].map(|name| {
            world.add_server(name, product, Options::default().pool("plain", "dir"));
            world.connect("contract", name)
        });
        world.add_server("c", product, Options::cluster(&["m1", "m2"]));
        Self {
            world,
            product,
            servers,
        }
    }
}

#[async_trait]
impl World for Sim {
    fn product(&self) -> Product {
        self.product
    }

    fn source(&self) -> &dyn Server {
        &self.servers[0]
    }

    fn target(&self) -> &dyn Server {
        &self.servers[1]
    }

    fn source_address(&self) -> String {
        "https://a".to_owned()
    }

    fn target_address(&self) -> String {
        "https://b".to_owned()
    }

    fn name(&self, base: &str) -> String {
        base.to_owned()
    }

    async fn make(&self, name: &str, new: New) {
        let root = [("type", "disk"), ("path", "/"), ("pool", "default")];
        let mut options = InstanceOptions {
            running: new.running,
            ..InstanceOptions::default()
        }
        .device("root", &root)
        .guest(if new.ignores_stop { Guest::Ignores } else { Guest::Obeys });
        for number in 0..new.snapshots {
            options = options.snapshot(&format!("s{number}"));
        }
        self.world.add_instance("a", &contract::at(name), options);
    }

    async fn pause(&self) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

macro_rules! tests_of {
    ($($module:ident: [$($check:ident),* $(,)?],)*) => {
        tests_of! { incus, Product::Incus, $($($module $check)*)* }
        tests_of! { lxd, Product::Lxd, $($($module $check)*)* }
    };
    ($word:ident, $product:expr, $($module:ident $check:ident)*) => {
        mod $word {
            use super::*;

            $(
                #[tokio::test(start_paused = true)]
                async fn $check() {
                    let sim = Sim::new($product);
                    contract::$module::$check(&sim).await;
                }
            )*
        }
    };
}

every_check!(tests_of);

#[async_trait]
impl Guests for Sim {
    async fn make_guest(&self, name: &str, guest: guests::Guest) {
        let pool = if guest.member.is_some() { "default" } else { "plain" };
        let root = [("type", "disk"), ("path", "/"), ("pool", pool)];
        let mut options = InstanceOptions::vm().device("root", &root);
        (options.running, options.member) = (guest.running, guest.member.map(str::to_owned));
        if guest.stateful {
            options = options.key("migration.stateful", "true");
        }
        let server = if guest.member.is_some() { "c" } else { "a" };
        self.world.add_instance(server, &contract::at(name), options);
    }

    async fn save(&self, name: &str) -> Result<(), String> {
        self.world.save("a", &contract::at(name))
    }

    fn cluster(&self) -> Option<Box<dyn Server>> {
        let incus = self.product == Product::Incus;
        incus.then(|| -> Box<dyn Server> { Box::new(self.world.connect("contract", "c")) })
    }
}

macro_rules! guest_tests_of {
    ($($check:ident),* $(,)?) => {
        guest_tests_of! { incus_guests, Product::Incus, $($check)* }
        guest_tests_of! { lxd_guests, Product::Lxd, $($check)* }
    };
    ($word:ident, $product:expr, $($check:ident)*) => {
        mod $word {
            use super::*;

            $(
                #[tokio::test(start_paused = true)]
                async fn $check() {
                    guests::$check(&Sim::new($product)).await;
                }
            )*
        }
    };
}

every_guest_check!(guest_tests_of);
