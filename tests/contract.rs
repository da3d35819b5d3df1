//! The contract of the port on real servers: two Incus servers, two LXD servers, through the client.

#[path = "contract/mod.rs"]
mod contract;

use std::process::ExitCode;
use std::time::Duration;

use async_trait::async_trait;
use berth_client::{Endpoint, HttpServer, Identity, ServerTrust, connect};
use berth_core::model::Product;
use berth_core::server::Server;
use berth_tests::{Needs, NewInstance, Server as LabServer, Suite, Test};
use contract::{New, World};

struct Real {
    test: Test,
    product: Product,
    servers: [(&'static LabServer, HttpServer); 2],
}

impl Real {
    fn new(test: Test, product: Product) -> Self {
        let names = match product {
            Product::Incus => ["i1", "i2"],
            Product::Lxd => ["l1", "l2"],
        };
        let lab = test.lab();
        let servers = names.map(|name| {
            let server = lab.server(name);
            let endpoint = Endpoint {
                addresses: vec![server.url.clone()],
                peer_address: None,
                identity: Identity {
                    certificate: lab.client_cert(),
                    key: lab.client_key().into(),
                },
                trust: ServerTrust::Fingerprint(server.fingerprint.clone()),
            };
            (server, connect(&endpoint).expect("the lab's certificates can be read"))
        });
        Self { test, product, servers }
    }
}

#[async_trait]
impl World for Real {
    fn product(&self) -> Product {
        self.product
    }

    fn source(&self) -> &dyn Server {
        &self.servers[0].1
    }

    fn target(&self) -> &dyn Server {
        &self.servers[1].1
    }

    fn source_address(&self) -> String {
        self.servers[0].1.peer_address()
    }

    fn target_address(&self) -> String {
        self.servers[1].1.peer_address()
    }

    fn name(&self, base: &str) -> String {
        self.test.unique(base)
    }

    async fn make(&self, name: &str, new: New) {
        let container = NewInstance {
            start: new.running,
            snapshots: new.snapshots,
            ignore_stop: new.ignores_stop,
            ..NewInstance::default()
        };
        self.servers[0].0.create(name, &container).await;
    }

    async fn pause(&self) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

macro_rules! suite_of {
    ($($module:ident: [$($check:ident),* $(,)?],)*) => {
        fn main() -> ExitCode {
            let mut suite = Suite::new("contract", &[Needs::Lab]);
            for (product, word) in [(Product::Incus, "incus"), (Product::Lxd, "lxd")] {
                $($(
                    suite = suite.together(
                        &format!("{word}_{}", stringify!($check)),
                        move |test: Test| async move { contract::$module::$check(&Real::new(test, product)).await },
                    );
                )*)*
            }
            suite.main()
        }
    };
}

every_check!(suite_of);
