//! What the chart lets its service account do: all that the controller needs and nothing that it does not. The controller
//! runs as rendered, under a token of the rendered service account, and the API server's audit log is the judge.

use std::collections::BTreeSet;
use std::time::Duration;

use berth_tests::{
    AuditEvent, Controller, NewInstance, Placement, SOON, Test, condition, example, objects_of, reason, wait_for,
};
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};

berth_tests::suite! {
    needs: [Kube, Lab, Helm],
    together: [
        every_right_of_a_release_for_one_namespace_is_needed_and_none_is_missing,
        without_a_right_the_work_stops_and_goes_on_when_it_is_given_back,
        a_release_for_some_namespaces_knows_nothing_of_the_others,
        the_rights_of_the_chart_are_those_that_it_names_and_no_others,
        a_team_may_place_instances_but_has_no_say_about_servers_secrets_and_records,
    ],
    // a release for all namespaces looks after those of other tests, too
    alone: [
        every_right_of_a_release_for_all_namespaces_is_needed_and_none_is_missing,
    ],
}

/// A release without the definitions, which all suites share.
struct Release {
    test: Test,
    namespace: String,
    objects: Vec<Value>,
}

impl Release {
    /// Installs it, or changes its values.
    async fn install(test: &Test, mut values: Value) -> Release {
        values["crds"] = json!({"enabled": false});
        let file = test.dir().join("values.json");
        std::fs::write(&file, values.to_string()).expect("the values can be written");
        let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/berth");
        let (file, namespace) = (file.display().to_string(), test.unique("berth"));
        let args = ["upgrade", "--install", "berth", chart, "--create-namespace"];
        let args = [&args[..], &["--values", &file, "--namespace", &namespace]].concat();
        test.helm(&args).await.unwrap_or_else(|error| panic!("{error}"));
        let manifest = test
            .helm(&["get", "manifest", "berth", "--namespace", &namespace])
            .await;
        Release {
            test: test.clone(),
            namespace,
            objects: objects_of(&manifest.unwrap_or_else(|error| panic!("{error}"))),
        }
    }

    async fn pod(&self) -> Controller {
        let options = self.test.as_rendered(&self.objects, &self.namespace).await;
        self.test.controller_with(options).await
    }

    async fn uninstall(self) {
        let args = ["uninstall", "berth", "--namespace", &self.namespace];
        self.test.helm(&args).await.unwrap_or_else(|error| panic!("{error}"));
        let args = ["delete", "namespace", &self.namespace, "--wait=false"];
        self.test
            .kube()
            .kubectl(&args)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
    }

    fn requests(&self) -> Vec<AuditEvent> {
        self.test.kube().requests_of("berth", &self.namespace)
    }
}

/// One verb on one resource: what a rule is a product of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    /// Kind and name of the role that gives it.
    role: String,
    /// Empty: everywhere.
    namespace: String,
    group: String,
    resource: String,
    verb: String,
    /// Empty: any.
    name: String,
}

fn texts(value: &Value) -> Vec<String> {
    let list = value.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

/// All rights that the roles among these objects give.
fn rights_of(objects: &[Value]) -> Vec<Right> {
    let mut rights = Vec::new();
    for role in objects
        .iter()
        .filter(|o| o["kind"] == "Role" || o["kind"] == "ClusterRole")
    {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (kind, name) = (text(&role["kind"]), text(&role["metadata"]["name"]));
        for rule in role["rules"].as_array().into_iter().flatten() {
            let mut names = texts(&rule["resourceNames"]);
            if names.is_empty() {
                names.push(String::new());
            }
            for group in texts(&rule["apiGroups"]) {
                for resource in texts(&rule["resources"]) {
                    for verb in texts(&rule["verbs"]) {
                        rights.extend(names.iter().map(|object| Right {
                            role: format!("{kind} \"{name}"),
                            namespace: text(&role["metadata"]["namespace"]),
                            group: group.clone(),
                            resource: resource.clone(),
                            verb: verb.clone(),
                            name: object.clone(),
                        }));
                    }
                }
            }
        }
    }
    rights
}

impl Right {
    /// Whether the request was allowed by this right; two rights of the same never exist, so it needed this one.
    fn allowed(&self, request: &AuditEvent) -> bool {
        let about = &request.object_ref;
        let resource = match about.subresource.as_str() {
            "" => about.resource.clone(),
            sub => format!("{}/{sub}", about.resource),
        };
        let allowed_by = request.annotations.get("authorization.k8s.io/reason");
        (request.verb.as_str(), about.group.as_str(), resource) == (&self.verb, &self.group, self.resource.clone())
            && (self.name.is_empty() || self.name == about.name)
            && (self.namespace.is_empty() || self.namespace == about.namespace)
            && allowed_by.is_some_and(|reason| reason.contains(&self.role))
    }
}

/// The rights that nothing was asked for with.
fn unused(release: &Release) -> Vec<Right> {
    let requests = release.requests();
    let mut rights = rights_of(&release.objects);
    rights.retain(|right| !requests.iter().any(|request| right.allowed(request)));
    rights
}

/// What was asked for without a right.
fn refused(release: &Release) -> Vec<AuditEvent> {
    let mut requests = release.requests();
    let refused = Some(&"forbid".to_owned());
    requests.retain(|request| request.annotations.get("authorization.k8s.io/decision") == refused);
    requests
}

/// i1 by certificate, i2 by a token that it gave out.
async fn servers(test: &Test) {
    test.add_servers(&["i1"]).await;
    let who = format!("i2:{}", test.unique("berth"));
    let said = test.lab().incus(&["config", "trust", "add", &who, "--quiet"]).await;
    let said = said.unwrap_or_else(|error| panic!("{error}"));
    let token = said.split_whitespace().last().unwrap_or_default();
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "i2-token"}, "stringData": {"token": token},
    });
    test.apply(&secret.to_string()).await;
    let server = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "InstanceServer", "metadata": {"name": "i2"},
        "spec": {
            "addresses": [test.lab().server("i2").url],
            "credentials": {"trustTokenRef": {"name": "i2-token", "key": "token"}},
        },
    });
    test.apply(&server.to_string()).await;
    for name in ["i1", "i2"] {
        test.wait_ready("InstanceServer", name, "True/Connected", SOON).await;
    }
}

/// Another controller that writes its own finalizer on and off, so that ours is not always the first to know.
fn meddle(test: &Test, kind: &'static str, name: String) -> tokio::task::JoinHandle<()> {
    let api = test.kube().api(kind, &test.namespace());
    tokio::spawn(async move {
        let mut pause = tokio::time::interval(Duration::from_millis(15));
        for finalizers in [json!(["example.com/other"]), json!([])].iter().cycle() {
            pause.tick().await;
            let found = api.get_metadata(&name).await;
            let Ok(found) = found else { continue };
            let ours = found.metadata.finalizers.unwrap_or_default();
            let ours = ours.iter().filter(|f| !f.starts_with("example.com/")).map(|f| json!(f));
            let all: Vec<Value> = finalizers
                .as_array()
                .into_iter()
                .flatten()
                .cloned()
                .chain(ours)
                .collect();
            let patch = json!({"metadata": {"finalizers": all, "resourceVersion": found.metadata.resource_version}});
            // the other one was quicker
            let _ = api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
        }
    })
}

/// Another controller that writes on every move, so that ours is not always the last to have written.
fn meddle_with_moves(test: &Test) -> tokio::task::JoinHandle<()> {
    let api = test.kube().api("InstanceMove", &test.namespace());
    tokio::spawn(async move {
        let mut pause = tokio::time::interval(Duration::from_millis(15));
        for number in 0.. {
            pause.tick().await;
            let Ok(found) = api.list_metadata(&ListParams::default()).await else {
                continue;
            };
            for name in found.items.iter().filter_map(|m| m.metadata.name.as_deref()) {
                let patch = json!({"metadata": {"annotations": {"example.com/other": number.to_string()}}});
                // it is gone
                let _ = api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
            }
        }
    })
}

/// Does all that there is to do: joins with a token, moves an instance until old records are deleted, makes a copy and deletes
/// it, and gives the Lease up.
async fn do_everything(release: &Release) {
    let test = &release.test;
    let controller = release.pod().await;
    servers(test).await;
    let new = NewInstance {
        start: false,
        ..NewInstance::default()
    };
    let (name, copied) = (test.unique("web"), test.unique("copied"));
    for name in [&name, &copied] {
        test.lab().server("i1").create(name, &new).await;
    }
    let copy = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "InstanceCopy", "metadata": {"name": copied},
        "spec": {
            "source": {"server": "i1", "instance": copied}, "target": {"server": "i2"}, "deletionPolicy": "Delete",
        },
    });
    test.apply(&copy.to_string()).await;
    test.wait_ready("InstanceCopy", &copied, "True/UpToDate", SOON).await;
    test.delete("InstanceCopy", &copied).await;

    test.place(&Placement::new(&name, "i1")).await;
    test.wait_in_place(&name, "i1", SOON).await;
    let others = [
        ("InstancePlacement", name.clone()),
        ("InstanceServer", "i1".into()),
        ("InstanceServer", "i2".into()),
    ];
    let mut others = Vec::from(others.map(|(kind, name)| meddle(test, kind, name)));
    others.push(meddle_with_moves(test));
    // more than are kept; and until the meddlers were in the way once
    for number in 0..40 {
        let to = ["i2", "i1"][number % 2];
        test.retarget(&name, json!({"server": to})).await;
        test.wait_in_place(&name, to, SOON).await;
        if number >= 5 && unused(release).iter().all(|right| right.verb != "get") {
            break;
        }
    }
    for other in others {
        other.abort();
    }
    wait_for("old records to be deleted and the copy to be gone", SOON, || async {
        let copy = test.get("InstanceCopy", &copied).await;
        match (test.moves(&name).await.len(), copy) {
            (..=5, None) => Ok(()),
            (moves, copy) => Err(format!("{moves} moves, {copy:?}")),
        }
    })
    .await;
    assert!(!test.events(&name).await.is_empty(), "events are written");
    assert!(controller.term().await.success(), "it ends as it should");
}

async fn every_right_is_needed(test: Test, values: Value) {
    let release = Release::install(&test, values).await;
    let rights = rights_of(&release.objects);
    let distinct: BTreeSet<Right> = rights
        .iter()
        .map(|r| Right {
            role: String::new(),
            ..r.clone()
        })
        .collect();
    assert_eq!(rights.len(), distinct.len(), "no right is given twice: {rights:#?}");
    do_everything(&release).await;
    assert!(
        refused(&release).is_empty(),
        "something is missing: {:#?}",
        refused(&release)
    );
    assert!(
        unused(&release).is_empty(),
        "nobody needs these: {:#?}",
        unused(&release)
    );
    release.uninstall().await;
}

async fn every_right_of_a_release_for_all_namespaces_is_needed_and_none_is_missing(test: Test) {
    every_right_is_needed(test, json!({"trustTokens": {"enabled": true}})).await;
}

async fn every_right_of_a_release_for_one_namespace_is_needed_and_none_is_missing(test: Test) {
    let values = json!({"trustTokens": {"enabled": true}, "namespaces": [test.namespace()]});
    every_right_is_needed(test, values).await;
}

/// Replaces the rules of the release's Role in the test's namespace.
async fn set_rules(release: &Release, rules: &Value) {
    let role = release
        .objects
        .iter()
        .find(|o| o["kind"] == "Role" && o["metadata"]["namespace"] != release.namespace.as_str());
    let mut role = role.expect("a Role in the users' namespace").clone();
    role["rules"] = rules.clone();
    release.test.apply(&role.to_string()).await;
}

/// The rules without one verb on one resource.
fn without(rules: &Value, resource: &str, verb: &str) -> Value {
    let rules = rules.as_array().into_iter().flatten().flat_map(|rule| {
        let (with, mut rest) = (rule.clone(), rule.clone());
        let has = |key: &str, what: &str| texts(&with[key]).iter().any(|text| text == what);
        if !has("resources", resource) || !has("verbs", verb) {
            return vec![with];
        }
        let others =
            |key: &str, what: &str| json!(texts(&with[key]).into_iter().filter(|t| t != what).collect::<Vec<_>>());
        let mut other_resources = with.clone();
        other_resources["resources"] = others("resources", resource);
        rest["resources"] = json!([resource]);
        rest["verbs"] = others("verbs", verb);
        let mut parts = vec![other_resources, rest];
        parts.retain(|part| !texts(&part["resources"]).is_empty() && !texts(&part["verbs"]).is_empty());
        parts
    });
    json!(rules.collect::<Vec<_>>())
}

async fn without_a_right_the_work_stops_and_goes_on_when_it_is_given_back(test: Test) {
    let release = Release::install(&test, json!({"namespaces": [test.namespace()]})).await;
    let role = release
        .objects
        .iter()
        .find(|o| o["kind"] == "Role" && o["metadata"]["namespace"] == test.namespace().as_str());
    let rules = role.expect("a Role in the users' namespace")["rules"].clone();
    let _controller = release.pod().await;
    let name = test.unique("web");
    test.lab().server("i1").create(&name, &NewInstance::default()).await;

    set_rules(&release, &without(&rules, "secrets", "get")).await;
    test.add_servers(&["i1", "i2"]).await;
    let server = test
        .wait_ready("InstanceServer", "i1", "False/CredentialsMissing", SOON)
        .await;
    let said = condition(&server, "Ready")
        .map(|c| c["message"].to_string())
        .unwrap_or_default();
    assert!(said.contains("forbidden"), "{said}");
    set_rules(&release, &rules).await;
    for server in ["i1", "i2"] {
        test.wait_ready("InstanceServer", server, "True/Connected", SOON).await;
    }

    for (resource, verb) in [
        ("instancemoves", "create"),
        ("instancemoves/status", "update"),
        ("instanceservers", "patch"),
    ] {
        test.place(&Placement::new(&name, "i1")).await;
        test.wait_in_place(&name, "i1", SOON).await;
        let refused_before = refused(&release).len();
        set_rules(&release, &without(&rules, resource, verb)).await;
        test.retarget(&name, json!({"server": "i2"})).await;
        wait_for(&format!("{verb} {resource} to be refused"), SOON, || async {
            let refused = refused(&release);
            let such = |r: &&AuditEvent| r.verb == verb && resource.starts_with(&r.object_ref.resource);
            if refused[refused_before..].iter().any(|r| such(&r)) {
                Ok(())
            } else {
                Err(format!("{refused:?}"))
            }
        })
        .await;
        let everywhere = test.lab().whereabouts(&name).await;
        let before = [("i1".to_owned(), "Running".to_owned())];
        assert_eq!(everywhere, before, "without {verb} {resource} nothing is begun");
        set_rules(&release, &rules).await;
        test.wait_in_place(&name, "i2", SOON).await;
        test.retarget(&name, json!({"server": "i1"})).await;
    }
    release.uninstall().await;
}

async fn a_release_for_some_namespaces_knows_nothing_of_the_others(test: Test) {
    let (second, third) = (test.unique("second"), test.unique("third"));
    for namespace in [&second, &third] {
        let made = test.kube().kubectl(&["create", "namespace", namespace]).await;
        made.unwrap_or_else(|error| panic!("{error}"));
    }
    let release = Release::install(&test, json!({"namespaces": [test.namespace(), second]})).await;
    let _controller = release.pod().await;
    test.add_servers(&["i1"]).await;
    for namespace in [&second, &third] {
        for (kind, name) in [("secret", "berth-client"), ("instanceserver", "i1")] {
            let get = ["get", kind, name, "-n", &test.namespace(), "-o", "json"];
            let text = test
                .kube()
                .kubectl(&get)
                .await
                .unwrap_or_else(|error| panic!("{error}"));
            let mut object: Value = serde_json::from_str(&text).expect("JSON");
            object["metadata"] = json!({"name": name, "namespace": namespace});
            let create = test
                .kube()
                .kubectl_with_input(&["create", "-f", "-"], &object.to_string())
                .await;
            create.unwrap_or_else(|error| panic!("{error}"));
        }
    }
    let ready = |object: &Value| reason(object) == "True/Connected";
    let servers = |namespace: &str| test.kube().api("InstanceServer", namespace);
    for namespace in [test.namespace(), second.clone()] {
        test.wait_in(&servers(&namespace), "i1", "ready", SOON, ready).await;
    }
    let requests = release.requests();
    let there = requests.iter().filter(|r| r.object_ref.namespace == third);
    assert_eq!(there.count(), 0, "nothing was asked of another namespace");
    assert!(refused(&release).is_empty(), "{:#?}", refused(&release));
    let untouched = servers(&third).get("i1").await.map(|object| json!(object));
    let untouched = untouched.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        untouched["status"]["observedGeneration"], -1,
        "nobody looks at it: {untouched:#}"
    );
    release.uninstall().await;
    for namespace in [&second, &third] {
        let _ = test
            .kube()
            .kubectl(&["delete", "namespace", namespace, "--wait=false"])
            .await;
    }
}

async fn may(release: &Release, namespace: &str, verb: &str, resource: &str) -> bool {
    let user = format!("system:serviceaccount:{}:berth", release.namespace);
    let args = ["auth", "can-i", verb, resource, "-n", namespace, "--as", &user];
    // "no" ends with 1, and so does an error: the caller asks for something allowed, too
    release.test.kube().kubectl(&args).await.is_ok()
}

async fn the_rights_of_the_chart_are_those_that_it_names_and_no_others(test: Test) {
    let here = test.namespace();
    let release = Release::install(&test, json!({"namespaces": [here]})).await;
    for (verb, resource) in [
        ("get", "secrets"),
        ("watch", "instanceplacements.berth.dev"),
        ("create", "instancemoves.berth.dev"),
    ] {
        assert!(
            may(&release, &here, verb, resource).await,
            "{verb} {resource} is allowed"
        );
    }
    for (verb, resource) in [
        ("list", "secrets"),
        ("watch", "secrets"),
        ("create", "secrets"),
        ("patch", "secrets"),
        ("update", "instanceplacements.berth.dev"),
        ("delete", "instanceplacements.berth.dev"),
        ("create", "instanceplacements.berth.dev"),
        ("delete", "instanceservers.berth.dev"),
        ("list", "pods"),
        ("list", "namespaces"),
        ("get", "customresourcedefinitions/others.example.com"),
        ("update", "leases.coordination.k8s.io/somebody-elses"),
    ] {
        assert!(
            !may(&release, &here, verb, resource).await,
            "{verb} {resource} is refused"
        );
    }
    for (verb, resource) in [("get", "secrets"), ("list", "instanceplacements.berth.dev")] {
        assert!(
            !may(&release, "default", verb, resource).await,
            "{verb} {resource} elsewhere"
        );
    }
    let release = Release::install(&test, json!({"trustTokens": {"enabled": true}})).await;
    assert!(
        may(&release, "default", "list", "instanceplacements.berth.dev").await,
        "everywhere"
    );
    assert!(may(&release, &here, "create", "secrets").await, "for trust tokens");
    assert!(!may(&release, &here, "list", "secrets").await, "never all secrets");
    release.uninstall().await;
}

/// The roles of the example are what docs/operations.md says of them.
async fn a_team_may_place_instances_but_has_no_say_about_servers_secrets_and_records(test: Test) {
    let (here, role, team) = (test.namespace(), test.unique("berth-team"), test.unique("shop-team"));
    let renamed = [
        ("name: berth-team", &role),
        ("namespace: shop", &here),
        ("name: shop-team", &team),
    ];
    let renamed = renamed.map(|(from, to)| (from, format!("{}: {to}", from.split(':').next().unwrap_or_default())));
    let renamed = renamed.each_ref().map(|(from, to)| (*from, to.as_str()));
    test.apply(&example("tenancy.yaml", &renamed)).await;
    let asked = async |verb: &str, what: &str, namespace: &str| {
        let (what, part) = what.split_once('/').unwrap_or((what, ""));
        let part = format!("--subresource={part}");
        let who = ["--as=somebody", "--as-group", &team];
        let args = [&["auth", "can-i", verb, what, &part, "-n", namespace][..], &who].concat();
        test.kube().kubectl(&args).await.is_ok()
    };
    for (verb, what) in [
        ("create", "instanceplacements.berth.dev"),
        ("delete", "instancecopies.berth.dev"),
        ("patch", "instancemoves.berth.dev"),
        ("watch", "instanceservers.berth.dev"),
        ("list", "events"),
    ] {
        assert!(asked(verb, what, &here).await, "{verb} {what}");
        assert!(!asked(verb, what, "default").await, "{verb} {what} elsewhere");
    }
    for (verb, what) in [
        ("get", "secrets"),
        ("patch", "instanceservers.berth.dev"),
        ("create", "instancemoves.berth.dev"),
        ("update", "instancemoves.berth.dev"),
        ("patch", "instancemoves.berth.dev/status"),
        ("patch", "instanceplacements.berth.dev/status"),
    ] {
        assert!(!asked(verb, what, &here).await, "{verb} {what}");
    }
    let args = ["delete", "clusterrole", &role];
    test.kube()
        .kubectl(&args)
        .await
        .unwrap_or_else(|error| panic!("{error}"));
}
