//! Real servers for the contract: two of one product, through the client.

use std::time::Duration;

use async_trait::async_trait;
use berth_client::{Endpoint, HttpServer, Identity, ServerTrust, connect};
use berth_core::model::Product;
use berth_core::server::Server;
use berth_tests::{NewInstance, Server as LabServer, Test};

use super::contract::{New, World};

/// A client of the servers of those names (of one cluster, if several).
pub fn client(test: &Test, names: &[&str], identity: Option<Identity>) -> HttpServer {
    let lab = test.lab();
    let known = || Identity {
        certificate: lab.client_cert(),
        key: lab.client_key().into(),
    };
    let endpoint = Endpoint {
        addresses: names.iter().map(|name| lab.server(name).url.clone()).collect(),
        peer_address: None,
        identity: identity.unwrap_or_else(known),
        trust: ServerTrust::Fingerprint(lab.server(names[0]).fingerprint.clone()),
    };
    connect(&endpoint).expect("the lab's certificates can be read")
}

/// Two of the lab's servers of one product.
pub struct Real {
    /// The test that they serve.
    pub test: Test,
    product: Product,
    /// Source and target.
    pub servers: [(&'static LabServer, HttpServer); 2],
}

impl Real {
    /// The lab's first two of that product.
    pub fn new(test: Test, product: Product) -> Self {
        let names = match product {
            Product::Incus => ["i1", "i2"],
            Product::Lxd => ["l1", "l2"],
        };
        let lab = test.lab();
        let servers = names.map(|name| {
            let server = lab.server(name);
            (server, client(&test, &[name], None))
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
