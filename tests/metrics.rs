//! What the chart gives to Prometheus and Grafana holds of the real thing: a real Prometheus reads a real controller, takes
//! the alerts as they are, and every query of the dashboard finds what it asks for.

use std::path::Path;
use std::process::Stdio;

use berth_tests::{Controller, NewInstance, Placement, SOON, Test, wait_for};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

berth_tests::suite! {
    needs: [Kube, Lab],
    together: [
        a_story_is_told_in_numbers,
        prometheus_takes_the_alerts_and_every_query_of_the_dashboard_finds_its_metric,
    ],
    alone: [],
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent")
}

/// A move that succeeds, a placement that waits for a person, one that only watches.
async fn story(test: &Test) -> Controller {
    let (web, gone, seen) = (test.unique("web"), test.unique("gone"), test.unique("seen"));
    let here = test.lab().server("i1");
    here.create(&web, &NewInstance::default()).await;
    here.create(&seen, &NewInstance::default()).await;
    let controller = test.controller().await;
    test.add_servers(&["i1", "i2"]).await;
    test.place(&Placement::new(&web, "i2")).await;
    test.place(&Placement::new(&gone, "i2")).await;
    test.apply(
        &json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "InstancePlacement", "metadata": {"name": seen},
            "spec": {"target": {"server": "i2"}, "mode": "Observe"},
        })
        .to_string(),
    )
    .await;
    test.wait_in_place(&web, "i2", SOON).await;
    controller
}

/// The value of a sample whose name and labels are these.
fn sample(text: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let line = text.lines().find(|line| {
        let named = line
            .strip_prefix(name)
            .is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '));
        named
            && labels
                .iter()
                .all(|(key, value)| line.contains(&format!("{key}=\"{value}\"")))
    })?;
    line.rsplit(' ').next()?.parse().ok()
}

async fn a_story_is_told_in_numbers(test: Test) {
    let controller = story(&test).await;
    let namespace = test.namespace();
    type Sample<'a> = (&'a str, Vec<(&'a str, &'a str)>, f64);
    let expected: [Sample<'_>; 8] = [
        ("berth_placements", vec![("reason", "InPlace"), ("state", "Ready")], 1.0),
        (
            "berth_placements",
            vec![("reason", "InstanceNotFound"), ("state", "Stalled")],
            1.0,
        ),
        (
            "berth_placements",
            vec![("reason", "DriftObserved"), ("state", "Waiting")],
            1.0,
        ),
        ("berth_placements_drifted", vec![("drift", "WrongServer")], 1.0),
        (
            "berth_moves_total",
            vec![("result", "Succeeded"), ("reason", "None")],
            1.0,
        ),
        ("berth_moves_in_flight", vec![], 0.0),
        (
            "berth_server_up",
            vec![("namespace", namespace.as_str()), ("server", "i1")],
            1.0,
        ),
        ("berth_leader", vec![], 1.0),
    ];
    wait_for("the numbers to tell the story", SOON, || async {
        let text = controller
            .http_get("/metrics")
            .await
            .map_err(|error| error.to_string())?;
        for (name, labels, value) in &expected {
            if sample(&text, name, labels) != Some(*value) {
                return Err(format!("{name} {labels:?} is not {value}:\n{text}"));
            }
        }
        for counted in ["berth_move_downtime_seconds_count", "berth_move_duration_seconds_count"] {
            if sample(&text, counted, &[]) != Some(1.0) {
                return Err(format!("{counted} is not 1:\n{text}"));
            }
        }
        // labels are names and words of fixed lists, so their number does not grow with the instances
        let wordy = text
            .lines()
            .find(|line| !line.starts_with('#') && line.contains("web-"));
        wordy.map_or(Ok(()), |line| Err(format!("a label names an instance: {line}")))
    })
    .await;
}

/// A real Prometheus that reads this controller every second.
struct Prometheus {
    port: u16,
    _child: Child,
}

impl Prometheus {
    async fn start(test: &Test, controller: &Controller) -> Prometheus {
        let dir = test.dir().join("prometheus");
        std::fs::create_dir_all(&dir).expect("a folder can be made");
        let config = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [root().join("charts/berth/files/alerts.yaml")],
            "scrape_configs": [{
                "job_name": "berth", "static_configs": [{"targets": [format!("127.0.0.1:{}", controller.port())]}],
            }],
        });
        let file = dir.join("prometheus.yml");
        std::fs::write(&file, config.to_string()).expect("its configuration can be written");
        let free = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr());
        let port = free.expect("there is a free port").port();
        let log = std::fs::File::create(dir.join("log")).expect("its log can be written");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .expect("prometheus starts: tests/deps.sh installs it");
        Prometheus { port, _child: child }
    }

    async fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, String> {
        let mut command = Command::new("curl");
        command.args(["-s", "-m", "10", "--get"]);
        for (key, value) in query {
            command.arg("--data-urlencode").arg(format!("{key}={value}"));
        }
        let output = command
            .arg(format!("http://127.0.0.1:{}/api/v1/{path}", self.port))
            .output()
            .await;
        let output = output.map_err(|error| error.to_string())?;
        let answer: Value = serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
        match answer["status"] == "success" {
            true => Ok(answer["data"].clone()),
            false => Err(answer.to_string()),
        }
    }
}

/// The names of our metrics in a query.
fn names(query: &str) -> Vec<&str> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("berth_")).collect()
}

/// Every query of the dashboard, with the panel that it is in.
fn queries(dashboard: &Value) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for panel in dashboard["panels"].as_array().into_iter().flatten() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            found.push((text(&panel["title"]), text(&target["expr"])));
        }
    }
    found
}

async fn prometheus_takes_the_alerts_and_every_query_of_the_dashboard_finds_its_metric(test: Test) {
    let controller = story(&test).await;
    let prometheus = Prometheus::start(&test, &controller).await;
    let rules = wait_for("every rule to be evaluated", SOON, || async {
        let groups = prometheus.get("rules", &[]).await?["groups"].clone();
        let rules: Vec<Value> = groups
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|g| g["rules"].as_array().cloned().unwrap_or_default())
            .collect();
        match rules.iter().find(|rule| rule["health"] != "ok") {
            None if rules.is_empty() => Err("there are no rules".to_owned()),
            None => Ok(rules),
            Some(rule) => Err(rule.to_string()),
        }
    })
    .await;
    let text = std::fs::read_to_string(root().join("charts/berth/files/dashboard.json")).expect("there is a dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("the dashboard is JSON");
    let mut all = queries(&dashboard);
    assert!(all.len() > 10, "the dashboard has queries: {all:?}");
    for rule in &rules {
        let text = |key: &str| rule[key].as_str().unwrap_or_default().to_owned();
        all.push((text("name"), text("query")));
    }
    let known = wait_for("all metrics to be read", SOON, || async {
        let known = prometheus.get("label/__name__/values", &[]).await?;
        let known: Vec<String> = serde_json::from_value(known).map_err(|error| error.to_string())?;
        let missing = |(place, query): &(String, String)| {
            let name = names(query).into_iter().find(|name| !known.iter().any(|k| k == name))?;
            Some(format!("{place}: there is no metric {name}; there are {known:?}"))
        };
        all.iter().find_map(missing).map_or(Ok(known.clone()), Err)
    })
    .await;
    assert!(known.iter().any(|name| name == "berth_leader"));
    for (place, query) in &all {
        let answer = prometheus.get("query", &[("query", query)]).await;
        answer.unwrap_or_else(|error| panic!("{place}: {error}"));
        assert!(
            !names(query).is_empty(),
            "{place}: the query asks for nothing of ours: {query}"
        );
    }
    let fired = wait_for(
        "the alert about the placement that waits for a person to be pending",
        SOON,
        || async {
            let alerts = prometheus.get("alerts", &[]).await?;
            let named = |alert: &&Value| alert["labels"]["alertname"] == "BerthPlacementStalled";
            let found = alerts["alerts"].as_array().into_iter().flatten().find(named).cloned();
            found.ok_or_else(|| alerts.to_string())
        },
    )
    .await;
    assert!(
        fired["annotations"]["description"]
            .as_str()
            .is_some_and(|text| text.contains("kubectl get iplace"))
    );
}
