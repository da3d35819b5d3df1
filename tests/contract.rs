//! The contract of the port on real servers, through the client: two Incus servers, two LXD servers, and what only real
//! servers can show.

#[path = "contract/mod.rs"]
mod contract;
#[path = "contract/real.rs"]
mod real;
#[path = "contract/servers.rs"]
mod servers;

use std::process::ExitCode;

use berth_core::model::Product;
use berth_tests::{Needs, Suite, Test};
use servers::Real;

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
