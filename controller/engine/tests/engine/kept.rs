//! Kept sources as a placement sees them: shown, ended in time and not before, used by the way back, left alone if somebody
//! used them.

use std::time::Duration;

use berth_api::{GoDuration, InstancePlacementSpec};
use berth_core::marks::{self, GUARD, Role};
use berth_core::model::{Change, Power, Product};
use berth_sim::{InstanceOptions, Options};
use tokio::time::sleep;

use crate::run;
use crate::town::{CONTROLLER, Town, at};

const HOUR: Duration = Duration::from_secs(3600);

fn keeps(hours: u64) -> impl FnOnce(&mut InstancePlacementSpec) {
    move |spec| {
        spec.keep_source = GoDuration::from_secs(hours * 3600);
        spec.target.pool = Some("plain".into());
    }
}

/// An instance that was moved from `a` to `b`, where its source is kept for ten hours.
async fn kept() -> Town {
    let town = Town::with(Product::Incus, &["a", "b"], || Options::default().pool("plain", "dir"));
    let root = [("type", "disk"), ("path", "/"), ("pool", "plain")];
    let options = InstanceOptions::default().device("root", &root);
    town.world.add_instance("a", &at("web-1"), options);
    town.place("web-1", "b", keeps(10));
    town.until_placed("web-1", "b").await;
    let source = town.world.instance("a", &at("web-1")).unwrap();
    assert_eq!(
        (source.power, marks::role(&source)),
        (Power::Stopped, Some(Role::Retired))
    );
    assert!(town.world.start("a", &at("web-1")).is_err(), "it is guarded");
    town
}

fn gone(town: &Town) -> bool {
    town.status("web-1").kept.is_empty() && town.world.instance("a", &at("web-1")).is_none()
}

#[test]
fn a_kept_source_is_shown_costs_nothing_and_is_deleted_when_its_time_is_over() {
    run(async {
        let town = kept().await;
        let shown = town.status("web-1").kept;
        assert_eq!((shown.len(), shown[0].server.as_str()), (1, "a"));
        assert!(shown[0].until.is_some());
        sleep(Duration::from_secs(30)).await;
        let asked = (
            town.world.reads(CONTROLLER),
            town.world.writes(CONTROLLER),
            town.passes(),
        );
        sleep(HOUR / 10).await;
        let now = (
            town.world.reads(CONTROLLER),
            town.world.writes(CONTROLLER),
            town.passes(),
        );
        assert_eq!(asked.1, now.1, "nothing is written");
        assert_eq!(asked.2, now.2, "nobody looks");
        sleep(9 * HOUR).await;
        assert!(!gone(&town));
        sleep(HOUR).await;
        assert!(gone(&town), "{:#?}", town.log());
        town.world.check().unwrap();
    });
}

#[test]
fn a_shorter_time_counts_at_once_a_longer_one_for_the_next_move() {
    run(async {
        let town = kept().await;
        let until = town.status("web-1").kept[0].until.clone();
        town.place("web-1", "b", keeps(1000));
        sleep(Duration::from_secs(5)).await;
        assert_eq!(town.status("web-1").kept[0].until, until);
        town.place("web-1", "b", keeps(0));
        town.until("it is deleted", gone).await;
    });
}

#[test]
fn nothing_is_deleted_as_long_as_the_placement_is_suspended() {
    run(async {
        let town = kept().await;
        town.place("web-1", "b", |spec| {
            keeps(10)(spec);
            spec.suspend = true;
        });
        sleep(20 * HOUR).await;
        assert!(town.world.instance("a", &at("web-1")).is_some());
        assert_eq!(town.status("web-1").kept[0].until, None);
        assert!(town.events().contains(&"Retired".to_owned()), "{:?}", town.events());
        town.place("web-1", "b", keeps(10));
        town.until("it is deleted", gone).await;
    });
}

#[test]
fn a_kept_source_outlives_its_placement_and_people_are_told() {
    run(async {
        let town = kept().await;
        let told = town.engine.outlived(crate::town::NAMESPACE, "uid-web-1");
        assert!(
            told[0].message.contains("incus delete --project default web-1"),
            "{told:?}"
        );
        town.forget("web-1");
        sleep(20 * HOUR).await;
        assert!(town.world.instance("a", &at("web-1")).is_some());
    });
}

#[test]
fn the_way_back_brings_it_up_to_date_and_keeps_what_it_leaves_behind() {
    run(async {
        let town = kept().await;
        assert!(town.world.write_data("b", &at("web-1")));
        town.place("web-1", "a", keeps(10));
        town.until_placed("web-1", "a").await;
        let newest = town.records().into_iter().max_by_key(|r| r.spec.attempt).unwrap();
        assert_eq!(newest.status.adopted, Some(true));
        assert_eq!(town.world.instance("a", &at("web-1")).unwrap().power, Power::Running);
        town.until("only the other one is kept", |t| {
            let kept = t.status("web-1").kept;
            kept.len() == 1 && kept[0].server == "b"
        })
        .await;
        // and another controller goes on with it
        let town = town.reborn("c2");
        town.place("web-1", "a", keeps(0));
        town.until("the other one is deleted", |t| {
            t.world.instance("b", &at("web-1")).is_none()
        })
        .await;
    });
}

#[test]
fn one_that_somebody_started_is_left_alone_and_keeps_others_from_its_name() {
    run(async {
        let town = kept().await;
        // a person wants to look into it: the instance is stopped, the guard taken off
        town.world.stop("b", &at("web-1")).unwrap();
        let mut change = Change::default();
        change.config.insert(marks::MOVE.to_owned(), "mine".to_owned());
        town.world.edit("a", &at("web-1"), &change).unwrap();
        town.until("it is forgotten", |t| t.status("web-1").kept.is_empty())
            .await;
        assert!(
            town.world
                .instance("a", &at("web-1"))
                .unwrap()
                .devices
                .contains_key(GUARD)
        );
        town.place("web-1", "a", keeps(0));
        town.until("it says so", |t| t.reason("web-1") == "NameTaken").await;
        town.world.delete("a", &at("web-1")).unwrap();
        town.until_placed("web-1", "a").await;
    });
}

#[test]
fn one_that_is_gone_is_forgotten() {
    run(async {
        let town = kept().await;
        town.world.delete("a", &at("web-1")).unwrap();
        town.until("it is forgotten", |t| t.status("web-1").kept.is_empty())
            .await;
        town.place("web-1", "a", keeps(0));
        town.until_placed("web-1", "a").await;
    });
}
