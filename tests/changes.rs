//! A move is under way and somebody changes his mind, or takes something away: the move is undone or finished, never both,
//! and in the end the instance exists and runs exactly once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_tests::{Controller, Placement, Proxy, SOON, Server, Test, condition, reason, wait_for};
use serde_json::{Value, json};

use road::{Call, Road, Subject, intact, known, subject, with_data};

mod road;

berth_tests::suite! {
    needs: [Kube, Lab],
    together: [
        there_and_back_in_the_middle_of_a_move_ends_where_it_began_on_incus,
        there_and_back_in_the_middle_of_a_move_ends_where_it_began_on_lxd,
        another_target_before_the_commit_is_where_it_ends_on_incus,
        another_target_before_the_commit_is_where_it_ends_on_lxd,
        another_target_after_the_commit_is_the_next_move_on_incus,
        another_target_after_the_commit_is_the_next_move_on_lxd,
        a_placement_that_is_deleted_before_the_commit_leaves_the_instance_where_it_was_on_incus,
        a_placement_that_is_deleted_before_the_commit_leaves_the_instance_where_it_was_on_lxd,
        a_placement_that_is_deleted_after_the_commit_leaves_the_instance_where_it_was_sent,
        a_record_that_is_deleted_before_the_commit_is_undone_and_the_next_move_succeeds,
        a_record_that_is_deleted_after_the_commit_is_finished_first,
        a_server_object_that_is_deleted_in_mid_move_stays_until_nothing_is_left_of_it_on_incus,
        a_server_object_that_is_deleted_in_mid_move_stays_until_nothing_is_left_of_it_on_lxd,
        a_secret_that_is_deleted_in_mid_move_does_not_strand_the_instance,
        a_namespace_that_is_deleted_before_the_commit_goes_away_and_the_instance_stays,
        a_namespace_that_is_deleted_after_the_commit_goes_away_and_the_instance_has_moved,
        suspend_undoes_what_is_not_committed_and_finishes_what_is,
        mode_observe_undoes_what_is_not_committed,
        a_cancelled_move_is_undone_and_none_follows_until_somebody_asks,
        a_cancel_that_comes_after_the_commit_changes_nothing,
    ],
    alone: [],
}

//---------------------------------------------------------------- how it must end

/// Watches that no instance of this test runs twice.
struct Once {
    task: tokio::task::JoinHandle<()>,
    twice: Arc<Mutex<Option<String>>>,
}

impl Once {
    fn watch(test: &Test, servers: [&'static str; 2]) -> Once {
        let (test, twice) = (test.clone(), Arc::new(Mutex::new(None)));
        let seen = Arc::clone(&twice);
        let task = tokio::spawn(async move {
            let servers = servers.map(|name| test.lab().server(name));
            let mut looks = tokio::time::interval(Duration::from_millis(400));
            loop {
                looks.tick().await;
                // the servers are asked one after the other, so a move can look like two; but not two times
                if runs_twice(&test, &servers).await.is_some()
                    && let Some(twice) = runs_twice(&test, &servers).await
                {
                    let mut kept = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.get_or_insert(twice);
                }
            }
        });
        Once { task, twice }
    }

    fn end(self) {
        self.task.abort();
        let twice = self.twice.lock().unwrap_or_else(PoisonError::into_inner).take();
        assert_eq!(twice, None, "an instance ran twice");
    }
}

async fn runs_twice(test: &Test, servers: &[&Server]) -> Option<String> {
    let mut running: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (server, instance) in copies(test, servers).await.ok()? {
        if instance["status"] == "Running" {
            let at = format!("{} on {server}", instance["name"]);
            let uuid = instance["config"]["volatile.uuid"].to_string();
            running.entry(uuid).or_default().push(at);
        }
    }
    running.values().find(|at| at.len() > 1).map(|at| at.join(" and "))
}

/// All instances of this test, under whatever name, and where they are.
async fn copies(test: &Test, servers: &[&Server]) -> Result<Vec<(String, Value)>, String> {
    let (mut found, id) = (Vec::new(), test.unique(""));
    for server in servers {
        let all = server.get("/1.0/instances?recursion=1").await;
        let all = all.map_err(|error| format!("{}: {error}", server.name))?;
        let mine = |i: &&Value| i["name"].as_str().is_some_and(|name| name.contains(&id));
        let mine = all.as_array().into_iter().flatten().filter(mine);
        found.extend(mine.map(|instance| (server.name.clone(), instance.clone())));
    }
    Ok(found)
}

/// Exactly one copy, under its name, running, as it was; nothing of Berth is left on it. No placement is asked.
async fn whole(test: &Test, web: &Subject, server: &str, boots: usize) {
    let servers: Vec<&Server> = test.lab().entrances().collect();
    wait_for(&format!("{} alone on {server}", web.name), SOON, || async {
        let found = copies(test, &servers).await?;
        let [(at, instance)] = found.as_slice() else {
            let names: Vec<String> = found
                .iter()
                .map(|(at, i)| format!("{at}:{} {}", i["name"], i["status"]))
                .collect();
            return Err(format!("{names:?}"));
        };
        let left = instance["config"].to_string().contains("berth") || instance["devices"].get("berth-guard").is_some();
        let rests = at == server && instance["name"] == web.name && instance["status"] == "Running" && !left;
        let seen = || {
            format!(
                "{at}: {} is {}, {}",
                instance["name"], instance["status"], instance["config"]
            )
        };
        rests.then_some(()).ok_or_else(seen)
    })
    .await;
    let here = test.lab().server(server);
    here.wait_counting(&web.name).await;
    let now = known(here, &web.name).await;
    assert_eq!(now.uuid, web.uuid, "the same identity");
    let instance = here.instance(&web.name).await.unwrap_or_default();
    assert_eq!(
        instance["config"].get("boot.autostart"),
        None,
        "boot.autostart is as before"
    );
    assert_eq!(here.boots(&web.name).await, boots, "boots");
}

/// What was deleted goes away: nothing holds it for ever.
async fn gone(test: &Test, kind: &str, name: &str) {
    wait_for(&format!("{kind} {name} to be gone"), SOON, || async {
        match test.get(kind, name).await {
            None => Ok(()),
            Some(object) => Err(format!("held by {}", object["metadata"]["finalizers"])),
        }
    })
    .await;
}

/// No object of this test carries a finalizer any more.
async fn nothing_held(test: &Test) {
    wait_for("all finalizers to be gone", SOON, || async {
        let mut held = Vec::new();
        for kind in ["InstanceServer", "InstancePlacement", "InstanceMove"] {
            let objects = test.list(kind).await;
            let such = objects.iter().filter(|o| o["metadata"].get("finalizers").is_some());
            held.extend(such.map(|o| format!("{kind} {}", o["metadata"]["name"])));
        }
        if held.is_empty() {
            Ok(())
        } else {
            Err(format!("{held:?}"))
        }
    })
    .await;
}

async fn outcomes(test: &Test, placement: &str) -> Vec<String> {
    let moves = test.moves(placement).await;
    let outcome = |m: &Value| m["status"]["outcome"].as_str().unwrap_or("open").to_owned();
    moves.iter().map(outcome).collect()
}

//---------------------------------------------------------------- a move that is held

/// A running instance on its way, held at a request.
struct Held {
    test: Test,
    road: Road,
    web: Subject,
    controller: Controller,
    once: Once,
    from: &'static str,
    to: &'static str,
}

impl Held {
    /// Makes an instance on `from` that is on its way to `to` and held at `call`.
    async fn at(test: &Test, from: &'static str, to: &'static str, call: Call) -> Held {
        let road = Road::between(test, from, to).await;
        let web = subject(test, from, "web", &with_data("default")).await;
        let controller = test.controller().await;
        test.wait_in_place(&web.name, from, SOON).await;
        let (test, once) = (test.clone(), Once::watch(test, [from, to]));
        let held = Held {
            test,
            road,
            web,
            controller,
            once,
            from,
            to,
        };
        held.send(to, call).await;
        held
    }

    /// Sends it to `to` and waits until it is held.
    async fn send(&self, to: &str, call: Call) {
        self.road.catch(&[(call, &self.web.name)]);
        self.test.retarget(&self.web.name, json!({"server": to})).await;
        self.road.caught().await;
    }

    async fn patch(&self, spec: Value) {
        self.test
            .patch("InstancePlacement", &self.web.name, json!({"spec": spec}))
            .await;
    }

    /// The name of the move in hand.
    async fn record(&self) -> String {
        let moves = self.test.moves(&self.web.name).await;
        let name = moves.last().and_then(|m| m["metadata"]["name"].as_str());
        name.unwrap_or_else(|| panic!("a move is under way")).to_owned()
    }

    /// Waits until the controller has seen the change, then lets the request go.
    async fn go_on_once_undoing(&self) {
        self.test.wait_step(&self.web.name, &["Undoing"], SOON).await;
        self.road.release().await;
    }

    async fn whole(&self, server: &str, boots: usize) {
        whole(&self.test, &self.web, server, boots).await;
    }

    fn end(self) {
        self.once.end();
    }
}

//---------------------------------------------------------------- another target

/// Once while data flow, once after the commit.
async fn there_and_back(test: Test, from: &'static str, to: &'static str) {
    let held = Held::at(&test, from, to, Call::Create).await;
    test.retarget(&held.web.name, json!({"server": from})).await;
    held.go_on_once_undoing().await;
    intact(&test, &held.web, from, 2..=2).await;
    assert_eq!(outcomes(&test, &held.web.name).await, ["Undone"]);
    for (number, call) in [Call::Own, Call::Delete].into_iter().enumerate() {
        held.send(to, call).await;
        test.retarget(&held.web.name, json!({"server": from})).await;
        held.road.release().await;
        let boots = 4 + 2 * number;
        intact(&test, &held.web, from, boots..=boots).await;
    }
    let ends = outcomes(&test, &held.web.name).await;
    assert!(ends.iter().skip(1).all(|end| end == "Succeeded"), "{ends:?}");
    nothing_held(&test).await;
    held.end();
}

async fn there_and_back_in_the_middle_of_a_move_ends_where_it_began_on_incus(test: Test) {
    there_and_back(test, "i1", "i2").await;
}

async fn there_and_back_in_the_middle_of_a_move_ends_where_it_began_on_lxd(test: Test) {
    there_and_back(test, "l2", "l1").await;
}

async fn another_target_early(test: Test, from: &'static str, to: &'static str, third: &str) {
    let held = Held::at(&test, from, to, Call::Create).await;
    test.add_server(third, test.lab().server(third), json!({})).await;
    test.retarget(&held.web.name, json!({"server": third})).await;
    held.go_on_once_undoing().await;
    intact(&test, &held.web, third, 3..=3).await;
    assert_eq!(outcomes(&test, &held.web.name).await, ["Undone", "Succeeded"]);
    let moves = test.moves(&held.web.name).await;
    assert_eq!(moves[1]["spec"]["from"]["server"], from, "it never was on {to}");
    held.end();
}

async fn another_target_late(test: Test, from: &'static str, to: &'static str, third: &str) {
    let held = Held::at(&test, from, to, Call::Start).await;
    test.add_server(third, test.lab().server(third), json!({})).await;
    test.retarget(&held.web.name, json!({"server": third})).await;
    held.road.release().await;
    intact(&test, &held.web, third, 3..=3).await;
    assert_eq!(outcomes(&test, &held.web.name).await, ["Succeeded", "Succeeded"]);
    let moves = test.moves(&held.web.name).await;
    assert_eq!(moves[1]["spec"]["from"]["server"], to, "it went by way of {to}");
    held.end();
}

async fn another_target_before_the_commit_is_where_it_ends_on_incus(test: Test) {
    another_target_early(test, "i1", "i2", "m1").await;
}

async fn another_target_before_the_commit_is_where_it_ends_on_lxd(test: Test) {
    another_target_early(test, "l1", "l2", "i1").await;
}

async fn another_target_after_the_commit_is_the_next_move_on_incus(test: Test) {
    another_target_late(test, "i2", "i1", "m1").await;
}

async fn another_target_after_the_commit_is_the_next_move_on_lxd(test: Test) {
    another_target_late(test, "l2", "l1", "i2").await;
}

//---------------------------------------------------------------- something is deleted

async fn placement_deleted_early(test: Test, from: &'static str, to: &'static str) {
    let held = Held::at(&test, from, to, Call::Create).await;
    test.delete("InstancePlacement", &held.web.name).await;
    held.go_on_once_undoing().await;
    gone(&test, "InstancePlacement", &held.web.name).await;
    held.whole(from, 2).await;
    nothing_held(&test).await;
    held.end();
}

async fn a_placement_that_is_deleted_before_the_commit_leaves_the_instance_where_it_was_on_incus(test: Test) {
    placement_deleted_early(test, "i1", "i2").await;
}

async fn a_placement_that_is_deleted_before_the_commit_leaves_the_instance_where_it_was_on_lxd(test: Test) {
    placement_deleted_early(test, "l1", "l2").await;
}

async fn a_placement_that_is_deleted_after_the_commit_leaves_the_instance_where_it_was_sent(test: Test) {
    let held = Held::at(&test, "i2", "i1", Call::Own).await;
    test.delete("InstancePlacement", &held.web.name).await;
    held.road.release().await;
    gone(&test, "InstancePlacement", &held.web.name).await;
    held.whole("i1", 2).await;
    nothing_held(&test).await;
    held.end();
}

async fn a_record_that_is_deleted_before_the_commit_is_undone_and_the_next_move_succeeds(test: Test) {
    let held = Held::at(&test, "i1", "i2", Call::Create).await;
    let record = held.record().await;
    test.delete("InstanceMove", &record).await;
    held.go_on_once_undoing().await;
    gone(&test, "InstanceMove", &record).await;
    held.whole("i1", 2).await;
    let web = held.web.name.clone();
    // deleting a record is a cancel, and what is asked for anew is done
    test.wait_ready("InstancePlacement", &web, "False/MoveCancelled", SOON)
        .await;
    request(&test, &web).await;
    intact(&test, &held.web, "i2", 3..=3).await;
    held.end();
}

async fn a_record_that_is_deleted_after_the_commit_is_finished_first(test: Test) {
    let held = Held::at(&test, "l1", "l2", Call::Delete).await;
    let record = held.record().await;
    test.delete("InstanceMove", &record).await;
    assert!(
        test.get("InstanceMove", &record).await.is_some(),
        "it is held until the source is gone"
    );
    held.road.release().await;
    gone(&test, "InstanceMove", &record).await;
    intact(&test, &held.web, "l2", 2..=2).await;
    held.end();
}

/// The source's before the commit, the target's after it.
async fn server_deleted(test: Test, from: &'static str, to: &'static str) {
    let held = Held::at(&test, from, to, Call::Own).await;
    test.delete("InstanceServer", to).await;
    let server = test.get("InstanceServer", to).await.unwrap_or_default();
    assert_eq!(
        server["metadata"]["finalizers"],
        json!(["berth.dev/move"]),
        "held by the move"
    );
    held.road.release().await;
    held.whole(to, 2).await;
    gone(&test, "InstanceServer", to).await;
    test.wait_ready("InstancePlacement", &held.web.name, "False/ServerNotFound", SOON)
        .await;
    add_back(&test, &held, to).await;
    intact(&test, &held.web, to, 2..=2).await;
    held.send(from, Call::Create).await;
    test.delete("InstanceServer", to).await;
    test.retarget(&held.web.name, json!({"server": to})).await;
    held.go_on_once_undoing().await;
    held.whole(to, 3).await;
    gone(&test, "InstanceServer", to).await;
    nothing_held(&test).await;
    held.end();
}

async fn add_back(test: &Test, held: &Held, name: &str) {
    let server: &Server = test.lab().server(name);
    let proxies: Vec<&str> = held.road.proxies().map(Proxy::url).collect();
    let url = if name == held.from { proxies[0] } else { proxies[1] };
    let spec = json!({"addresses": [url], "peerAddress": server.url});
    test.add_server(name, server, spec).await;
}

async fn a_server_object_that_is_deleted_in_mid_move_stays_until_nothing_is_left_of_it_on_incus(test: Test) {
    server_deleted(test, "i1", "i2").await;
}

async fn a_server_object_that_is_deleted_in_mid_move_stays_until_nothing_is_left_of_it_on_lxd(test: Test) {
    server_deleted(test, "l2", "l1").await;
}

async fn a_secret_that_is_deleted_in_mid_move_does_not_strand_the_instance(test: Test) {
    let held = Held::at(&test, "i1", "i2", Call::Name).await;
    let namespace = test.namespace();
    let done = test
        .kube()
        .kubectl(&["delete", "secret", "berth-client", "-n", &namespace])
        .await;
    done.unwrap_or_else(|error| panic!("{error}"));
    held.road.release().await;
    held.whole("i2", 2).await;
    nothing_held(&test).await;
    assert_eq!(outcomes(&test, &held.web.name).await, ["Succeeded"]);
    held.end();
}

async fn namespace_deleted(test: Test, held: Held, server: &str) {
    let namespace = test.namespace();
    let args = ["delete", "namespace", &namespace, "--wait=false"];
    test.kube()
        .kubectl(&args)
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    wait_for("the objects to be marked for deletion", SOON, || async {
        let placement = test.get("InstancePlacement", &held.web.name).await;
        let marked = placement.is_none_or(|p| p["metadata"]["deletionTimestamp"].is_string());
        if marked { Ok(()) } else { Err("not yet".to_owned()) }
    })
    .await;
    held.road.release().await;
    wait_for("the namespace to be gone", SOON, || async {
        match test
            .kube()
            .kubectl(&["get", "namespace", &namespace, "-o", "json"])
            .await
        {
            Err(error) if error.contains("NotFound") => Ok(()),
            Err(error) => Err(error),
            Ok(text) => {
                let object: Value = serde_json::from_str(&text).unwrap_or_default();
                Err(object["status"]["conditions"].to_string())
            }
        }
    })
    .await;
    held.whole(server, 2).await;
    held.end();
}

async fn a_namespace_that_is_deleted_before_the_commit_goes_away_and_the_instance_stays(test: Test) {
    let held = Held::at(&test, "i1", "i2", Call::Create).await;
    namespace_deleted(test, held, "i1").await;
}

async fn a_namespace_that_is_deleted_after_the_commit_goes_away_and_the_instance_has_moved(test: Test) {
    let held = Held::at(&test, "l1", "l2", Call::Own).await;
    namespace_deleted(test, held, "l2").await;
}

//---------------------------------------------------------------- suspend, observe, cancel

async fn suspend_undoes_what_is_not_committed_and_finishes_what_is(test: Test) {
    let held = Held::at(&test, "i1", "i2", Call::Create).await;
    held.patch(json!({"suspend": true})).await;
    held.go_on_once_undoing().await;
    test.wait_ready("InstancePlacement", &held.web.name, "False/Suspended", SOON)
        .await;
    held.whole("i1", 2).await;
    assert_eq!(outcomes(&test, &held.web.name).await, ["Undone"]);
    held.road.catch(&[(Call::Own, &held.web.name)]);
    held.patch(json!({"suspend": false})).await;
    held.road.caught().await;
    held.patch(json!({"suspend": true})).await;
    held.road.release().await;
    intact(&test, &held.web, held.to, 3..=3).await;
    nothing_held(&test).await;
    held.end();
}

async fn mode_observe_undoes_what_is_not_committed(test: Test) {
    let held = Held::at(&test, "l1", "l2", Call::Create).await;
    held.patch(json!({"mode": "Observe"})).await;
    held.go_on_once_undoing().await;
    test.wait_ready("InstancePlacement", &held.web.name, "False/DriftObserved", SOON)
        .await;
    held.whole("l1", 2).await;
    nothing_held(&test).await;
    held.end();
}

async fn cancel(test: &Test, record: &str) {
    test.patch("InstanceMove", record, json!({"spec": {"cancel": true}}))
        .await;
}

/// What `flux reconcile` and a person who annotates do.
async fn request(test: &Test, placement: &str) {
    test.ask_again("InstancePlacement", placement, &test.unique("now"))
        .await;
}

async fn a_cancelled_move_is_undone_and_none_follows_until_somebody_asks(test: Test) {
    let held = Held::at(&test, "i1", "i2", Call::Create).await;
    let name = held.web.name.clone();
    cancel(&test, &held.record().await).await;
    held.go_on_once_undoing().await;
    cancelled(&test, &name).await;
    held.whole("i1", 2).await;
    // neither a second look nor a new controller begins another one: that it looked shows in what else it did
    let witness = test.unique("witness");
    test.lab().server("i2").create(&witness, &with_data("default")).await;
    held.controller.kill().await;
    let _second = test.controller().await;
    test.place(&Placement::new(&witness, "i2")).await;
    test.wait_in_place(&witness, "i2", SOON).await;
    cancelled(&test, &name).await;
    assert_eq!(outcomes(&test, &name).await, ["Cancelled"]);
    test.delete("InstancePlacement", &witness).await;
    test.lab()
        .server("i2")
        .delete(&witness)
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    request(&test, &name).await;
    intact(&test, &held.web, "i2", 3..=3).await;
    // the same again, and now the spec is changed
    held.send("i1", Call::Create).await;
    cancel(&test, &held.record().await).await;
    held.go_on_once_undoing().await;
    cancelled(&test, &name).await;
    held.patch(json!({"stop": {"timeout": "59s"}})).await;
    intact(&test, &held.web, "i1", 5..=5).await;
    let ends = outcomes(&test, &name).await;
    assert_eq!(ends, ["Cancelled", "Succeeded", "Cancelled", "Succeeded"]);
    held.end();
}

async fn cancelled(test: &Test, placement: &str) {
    let object = test
        .wait_ready("InstancePlacement", placement, "False/MoveCancelled", SOON)
        .await;
    let stalled = condition(&object, "Stalled").cloned().unwrap_or_default();
    assert_eq!(stalled["reason"], "MoveCancelled", "a person is needed");
    let said = stalled["message"].as_str().unwrap_or_default();
    assert!(said.contains("reconcile.fluxcd.io/requestedAt"), "{said}");
}

async fn a_cancel_that_comes_after_the_commit_changes_nothing(test: Test) {
    let held = Held::at(&test, "l2", "l1", Call::Rename).await;
    cancel(&test, &held.record().await).await;
    held.road.release().await;
    intact(&test, &held.web, "l1", 2..=2).await;
    assert_eq!(outcomes(&test, &held.web.name).await, ["Succeeded"]);
    let object = test.get("InstancePlacement", &held.web.name).await.unwrap_or_default();
    assert_eq!(reason(&object), "True/InPlace");
    held.end();
}
