//! The contract of the port on real servers, through the client: two Incus servers, two LXD servers, and what only real
//! servers can show.

#[path = "contract/mod.rs"]
mod contract;
#[path = "contract/real.rs"]
mod real;

use std::process::ExitCode;
use std::time::Duration;

use async_trait::async_trait;
use berth_client::HttpServer;
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
            (server, real::client(&test, &[name], None))
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

fn with_real_only(suite: Suite) -> Suite {
    macro_rules! add {
        ($suite:ident, $($check:ident),* $(,)?) => { $suite$(.together(stringify!($check), real::$check))* };
    }
    let suite = add!(
        suite,
        a_token_makes_incus_trust_a_new_certificate,
        a_token_makes_lxd_trust_a_new_certificate,
        a_cluster_is_one_server_with_members,
        a_move_to_another_pool_keeps_the_instance_and_forgets_when_it_ran,
        a_move_to_another_project_keeps_the_instance,
        an_instance_is_copied_from_lxd_to_incus,
        an_instance_is_copied_from_incus_to_lxd,
        a_restricted_certificate_sees_its_projects_and_nothing_else,
        an_event_stream_survives_a_minute_of_silence,
    );
    suite.alone(
        "a_cluster_is_reached_by_its_other_members",
        real::a_cluster_is_reached_by_its_other_members,
    )
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
            with_real_only(suite).main()
        }
    };
}

every_check!(suite_of);
