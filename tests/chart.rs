//! The Helm chart: it lints, it renders with every kind of values, and the real API server takes what it renders. What
//! becomes of a release is in `helm.rs`, what it may do in `rights.rs`.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use berth_tests::{Test, helm_program, objects_of, wait_until};
use serde_json::{Value, json};

berth_tests::suite! {
    needs: [Kube, Helm],
    together: [
    the_chart_lints_without_a_warning,
    every_set_of_values_renders_and_is_accepted_by_the_api_server,
    every_set_of_values_has_the_schema_of_the_api_server,
    values_that_make_no_sense_are_refused_before_anything_is_installed,
    a_budget_for_disruptions_comes_with_the_second_replica,
    the_bundle_and_the_kustomize_base_are_made_from_the_chart,
    the_definitions_are_those_of_the_project_and_are_kept_at_an_uninstall,
    the_pod_satisfies_the_restricted_pod_security_standard,
    ],
    alone: [],
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent")
}

/// Runs helm on the chart with its caches in the test's folder.
fn run_helm(test: &Test, args: &[&str], values: &Value) -> Output {
    let file = test.dir().join("values.yaml");
    std::fs::write(&file, values.to_string()).expect("the values can be written");
    let (action, rest) = args.split_first().expect("an action");
    let program = helm_program().expect("helm was there a moment ago");
    let mut command = Command::new(program);
    command.arg(action).args(rest).arg(root().join("charts/berth"));
    command.arg("--values").arg(&file);
    for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(variable, test.dir().join(variable));
    }
    command.env_remove("KUBECONFIG").output().expect("helm runs")
}

fn said(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

/// `helm template` for a release of the test's own in the test's namespace: the text and the objects.
fn render(test: &Test, values: &Value) -> (String, Vec<Value>) {
    let (release, namespace) = (test.unique("chart"), test.namespace());
    let output = run_helm(test, &["template", &release, "--namespace", &namespace], values);
    assert!(output.status.success(), "{values}: {}", said(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let objects = objects_of(&text);
    (text, objects)
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

/// Every sensible kind of values: as they come, for some namespaces, everything off, everything set.
fn sets_of_values(test: &Test) -> Vec<Value> {
    let account = test.unique("account");
    vec![
        json!({}),
        json!({
            "namespaces": [test.namespace()], "trustTokens": {"enabled": true}, "replicas": 2,
            "networkPolicy": {"enabled": true}, "serviceMonitor": {"enabled": true}, "prometheusRule": {"enabled": true},
            "dashboard": {"enabled": true},
        }),
        json!({
            "crds": {"enabled": false}, "rbac": {"create": false}, "service": {"enabled": false},
            "serviceAccount": {"create": false, "name": account},
        }),
        json!({
            "image": {"repository": "registry.example.com/berth", "digest": format!("sha256:{}", "a".repeat(64))},
            "imagePullSecrets": [{"name": "pull"}],
            "logLevel": "info,berth=debug", "logFormat": "json", "crds": {"keep": false},
            "serviceAccount": {"annotations": {"example.com/a": "b"}},
            "service": {"port": 9090, "annotations": {"example.com/a": "b"}},
            "podAnnotations": {"example.com/a": "b"}, "podLabels": {"example.com/team": "c"},
            "nodeSelector": {"kubernetes.io/os": "linux"}, "priorityClassName": "system-cluster-critical",
            "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
            "topologySpreadConstraints": [{
                "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "berth"}},
            }],
            "extraArgs": ["--log-format=json"], "extraEnv": [{"name": "A", "value": "b"}],
            "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
            "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ssl/certs", "readOnly": true}],
            "networkPolicy": {
                "enabled": true, "ingressFrom": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}],
                "egress": [{"ports": [{"port": 8443, "protocol": "TCP"}], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
            },
            "serviceMonitor": {"enabled": true, "interval": "1m", "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": true, "labels": {"release": "prometheus"}},
            "dashboard": {"enabled": true, "labels": {"grafana": "yes"}},
            "fullnameOverride": test.unique("other"),
        }),
    ]
}

async fn the_chart_lints_without_a_warning(test: Test) {
    for values in sets_of_values(&test) {
        let output = run_helm(&test, &["lint", "--strict"], &values);
        assert!(output.status.success(), "{values}: {}", said(&output));
    }
}

/// The definitions that a ServiceMonitor and a PrometheusRule need, for as long as the API server lives.
async fn with_monitoring(test: &Test) {
    let file = root().join("tests/fixtures/monitoring/crds.yaml").display().to_string();
    for args in [
        &["apply", "--server-side", "-f", &file][..],
        &["wait", "--for=condition=established", "--timeout=60s", "-f", &file],
    ] {
        test.kube().kubectl(args).await.expect("the definitions are accepted");
    }
}

async fn every_set_of_values_renders_and_is_accepted_by_the_api_server(test: Test) {
    with_monitoring(&test).await;
    for values in sets_of_values(&test) {
        let (text, objects) = render(&test, &values);
        assert_eq!(of_kind(&objects, "Deployment").len(), 1, "{values}");
        // nothing stays behind, but the server checks all of it: unknown fields, validation, rules of the definitions
        let args = [
            "apply",
            "--server-side",
            "--force-conflicts",
            "--dry-run=server",
            "--validate=strict",
            "-f",
            "-",
        ];
        let applied = test.kube().kubectl_with_input(&args, &text).await;
        applied.unwrap_or_else(|error| panic!("{values}: {error}"));
    }
}

/// One schema per kind, made of the API server's own description, in the layout that kubeconform reads.
async fn write_schemas(test: &Test, folder: &Path) {
    std::fs::create_dir_all(folder).expect("a folder can be made");
    let index = test
        .kube()
        .kubectl(&["get", "--raw", "/openapi/v3"])
        .await
        .expect("an index");
    let index: Value = serde_json::from_str(&index).expect("the index is JSON");
    for (path, entry) in index["paths"].as_object().into_iter().flatten() {
        if !path.starts_with("api") {
            continue;
        }
        let url = entry["serverRelativeURL"].as_str().unwrap_or_default();
        let text = test
            .kube()
            .kubectl(&["get", "--raw", url])
            .await
            .expect("a description");
        let description: Value = serde_json::from_str(&text).expect("the description is JSON");
        for (name, schema) in description["components"]["schemas"].as_object().into_iter().flatten() {
            for kind in schema["x-kubernetes-group-version-kind"]
                .as_array()
                .into_iter()
                .flatten()
            {
                let word = |key: &str| kind[key].as_str().unwrap_or_default().to_lowercase();
                // kubeconform calls the group of what has none by its version
                let group = Some(word("group")).filter(|g| !g.is_empty());
                let group = group.unwrap_or_else(|| word("version"));
                let file = format!("{}_{group}_{}.json", word("kind"), word("version"));
                let mut whole = json!({"$ref": format!("#/components/schemas/{name}")});
                whole["components"] = description["components"].clone();
                std::fs::write(folder.join(file), whole.to_string()).expect("a schema can be written");
            }
        }
    }
}

async fn every_set_of_values_has_the_schema_of_the_api_server(test: Test) {
    with_monitoring(&test).await;
    let folder = test.dir().join("schemas");
    // the definitions that the test brought are described a moment after they are served
    let all =
        ["servicemonitor", "prometheusrule"].map(|kind| folder.join(format!("{kind}_monitoring.coreos.com_v1.json")));
    wait_until(
        "the API server to describe all kinds",
        Duration::from_secs(120),
        || async {
            write_schemas(&test, &folder).await;
            all.iter().all(|file| file.exists())
        },
    )
    .await;
    let location = format!(
        "{}/{{{{.ResourceKind}}}}_{{{{.Group}}}}_{{{{.ResourceAPIVersion}}}}.json",
        folder.display()
    );
    let program = helm_program()
        .expect("helm was there a moment ago")
        .with_file_name("kubeconform");
    for values in sets_of_values(&test) {
        let (text, objects) = render(&test, &values);
        let file = test.dir().join("rendered.yaml");
        std::fs::write(&file, &text).expect("the rendered text can be written");
        let mut command = Command::new(&program);
        command
            .args(["-summary", "-output", "json", "-schema-location", &location])
            .arg(&file);
        let output = command.output().expect("kubeconform runs");
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said(&output)));
        assert!(output.status.success(), "{values}: {}", said(&output));
        assert_eq!(
            summary["summary"]["valid"],
            objects.len(),
            "{values}: all were checked: {summary}"
        );
    }
}

async fn a_budget_for_disruptions_comes_with_the_second_replica(test: Test) {
    for (replicas, budgets) in [(0, 0), (1, 0), (2, 1)] {
        let (_, objects) = render(&test, &json!({"replicas": replicas}));
        assert_eq!(
            of_kind(&objects, "PodDisruptionBudget").len(),
            budgets,
            "{replicas} replicas"
        );
    }
}

/// What `kubectl apply` needs when nobody uses helm: the namespace, and all that the chart renders by default.
async fn the_bundle_and_the_kustomize_base_are_made_from_the_chart(test: Test) {
    let args = ["template", "berth", "--namespace", "berth-system"];
    let output = run_helm(&test, &args, &json!({"crds": {"enabled": false}}));
    assert!(output.status.success(), "{}", said(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let of_helm = ["helm.sh/", "app.kubernetes.io/managed-by: Helm", "# Source: "];
    let lines = text
        .lines()
        .filter(|line| !of_helm.iter().any(|word| line.contains(word)));
    let head = "# Made from the chart by `UPDATE=1 tests/run.sh --test chart -- bundle`. Do not edit.\n\
        apiVersion: v1\nkind: Namespace\nmetadata:\n  name: berth-system\n  labels: {pod-security.kubernetes.io/enforce: restricted}\n";
    let bundle = lines.fold(head.to_owned(), |bundle, line| bundle + line.trim_end() + "\n");
    let file = root().join("charts/kustomize/berth.yaml");
    if std::env::var_os("UPDATE").is_some_and(|update| update == "1") {
        std::fs::write(&file, &bundle).expect("the bundle can be written");
    }
    let stored = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        stored == bundle,
        "{} is not up to date: UPDATE=1 tests/run.sh --test chart -- bundle",
        file.display()
    );
    let folder = root().join("charts").display().to_string();
    let built = test
        .kube()
        .kubectl(&["kustomize", &folder])
        .await
        .expect("the base is a base");
    let kinds = |text: &str| text.lines().filter(|line| line.starts_with("kind: ")).count();
    assert_eq!(
        kinds(&built),
        kinds(&bundle) + berth_api::crds().len(),
        "the base has all of it"
    );
    let create = test.kube().kubectl(&["create", "namespace", "berth-system"]).await;
    create.expect("the namespace can be created");
    let args = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--dry-run=server",
        "--validate=strict",
        "-f",
        "-",
    ];
    let applied = test.kube().kubectl_with_input(&args, &built).await;
    let delete = ["delete", "namespace", "berth-system", "--wait=false"];
    test.kube()
        .kubectl(&delete)
        .await
        .expect("the namespace can be deleted");
    applied.unwrap_or_else(|error| panic!("the base: {error}"));
}

async fn values_that_make_no_sense_are_refused_before_anything_is_installed(test: Test) {
    for (values, named) in [
        (json!({"replicas": "two"}), "replicas"),
        (json!({"namespaces": ["Not_A_Namespace"]}), "namespaces"),
        (json!({"namespaces": "shop"}), "namespaces"),
        (json!({"image": {"repository": ""}}), "repository"),
        (json!({"image": {"digest": "sha256:short"}}), "digest"),
        (json!({"crd": {"enabled": true}}), "crd"),
        (json!({"service": {"port": 0}}), "port"),
        (json!({"logFormat": "xml"}), "logFormat"),
        (json!({"serviceMonitor": {"interval": "often"}}), "interval"),
        (
            json!({"serviceMonitor": {"enabled": true}, "service": {"enabled": false}}),
            "service.enabled",
        ),
    ] {
        let output = run_helm(&test, &["template", "x"], &values);
        assert!(!output.status.success(), "{values} is accepted");
        let said = said(&output);
        assert!(
            said.contains(named),
            "{values}: the message does not name {named}: {said}"
        );
    }
}

async fn the_definitions_are_those_of_the_project_and_are_kept_at_an_uninstall(test: Test) {
    let (_, objects) = render(&test, &json!({}));
    let rendered = of_kind(&objects, "CustomResourceDefinition");
    let expected = berth_api::crds();
    assert_eq!(rendered.len(), expected.len());
    for crd in expected {
        let name = crd.metadata.name.clone().unwrap_or_default();
        let found = rendered
            .iter()
            .find(|object| object["metadata"]["name"] == name.as_str());
        let found = found.unwrap_or_else(|| panic!("{name} is not rendered"));
        let annotations = &found["metadata"]["annotations"];
        assert_eq!(annotations["helm.sh/resource-policy"], "keep", "{name}");
        assert_eq!(annotations["berth.dev/schema"], berth_api::SCHEMA.to_string(), "{name}");
        assert!(
            found["spec"] == json!(crd.spec),
            "{name} differs: UPDATE=1 cargo test --workspace --test tidy"
        );
    }
    let (_, objects) = render(&test, &json!({"crds": {"keep": false}}));
    for crd in of_kind(&objects, "CustomResourceDefinition") {
        assert_eq!(crd["metadata"]["annotations"]["helm.sh/resource-policy"], Value::Null);
    }
}

async fn the_pod_satisfies_the_restricted_pod_security_standard(test: Test) {
    let namespace = test.namespace();
    let enforce = "pod-security.kubernetes.io/enforce=restricted";
    let labelled = test.kube().kubectl(&["label", "namespace", &namespace, enforce]).await;
    labelled.expect("the namespace can be labelled");
    let privileged = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "privileged"},
        "spec": {"containers": [{"name": "a", "image": "a", "securityContext": {"privileged": true}}]},
    });
    let refused = test.try_apply(&privileged.to_string()).await;
    assert!(refused.is_err(), "the API server enforces the standard");
    for (number, values) in sets_of_values(&test).iter().enumerate() {
        let (_, objects) = render(&test, values);
        let mut pod = of_kind(&objects, "Deployment")[0]["spec"]["template"].clone();
        let container = &pod["spec"]["containers"][0]["securityContext"];
        assert_eq!(container["readOnlyRootFilesystem"], true);
        assert_eq!(container["capabilities"], json!({"drop": ["ALL"]}));
        pod["apiVersion"] = json!("v1");
        pod["kind"] = json!("Pod");
        pod["metadata"]["name"] = json!(format!("pod-{number}"));
        // no such class in a namespace that is not the system's
        pod["spec"]["priorityClassName"] = json!("");
        test.apply(&pod.to_string()).await;
    }
}
