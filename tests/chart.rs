//! The Helm chart: it lints, it renders with every kind of values, the real API server takes what it renders, and the
//! rights that it gives are enough for a move and no more.
//!
//! `helm` is built by `tests/kubernetes/control-plane.sh build-tools`. Without it the whole suite counts as skipped.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::time::Duration;

use berth_tests::{ControllerOptions, NewInstance, Placement, Test, condition};
use libtest_mimic::{Arguments, Trial};
use serde_json::{Value, json};

/// The suite, and the names of its tests for when it is skipped.
macro_rules! tests {
    ($($test:ident,)+) => {
        const TESTS: &[&str] = &[$(stringify!($test),)+];

        mod suite {
            use super::*;

            berth_tests::suite! { needs: [Kube, Lab], together: [$($test,)+], alone: [] }

            pub(super) fn run() -> ExitCode {
                main()
            }
        }
    };
}

tests! {
    the_chart_lints_without_a_warning,
    every_set_of_values_renders_and_is_accepted_by_the_api_server,
    every_set_of_values_has_the_schema_of_the_api_server,
    values_that_make_no_sense_are_refused_before_anything_is_installed,
    a_budget_for_disruptions_comes_with_the_second_replica,
    the_bundle_and_the_kustomize_base_are_made_from_the_chart,
    the_definitions_are_those_of_the_project_and_are_kept_at_an_uninstall,
    the_pod_satisfies_the_restricted_pod_security_standard,
    the_rights_of_the_chart_are_those_that_it_names_and_no_others,
    the_rights_of_the_chart_are_enough_for_a_move,
}

fn main() -> ExitCode {
    let Err(reason) = helm() else {
        return suite::run();
    };
    eprintln!("chart: skipped, {reason}");
    let skipped = |name: &&str| Trial::test(name.replace('_', " "), || Ok(())).with_ignored_flag(true);
    libtest_mimic::run(&Arguments::from_args(), TESTS.iter().map(skipped).collect()).exit_code()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent")
}

/// The helm program of the cache folder, else the one of `$PATH`; or what to do about it.
fn helm() -> Result<PathBuf, String> {
    let script = root().join("tests/kubernetes/control-plane.sh");
    let say = |what: &str| {
        let output = Command::new(&script).arg(what).output();
        let output = output.map_err(|error| format!("{} cannot be run: {error}", script.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if output.status.success() { Ok(text) } else { Err(text) }
    };
    let built = say("programs").map(|dir| PathBuf::from(dir).join("helm"));
    match built {
        Ok(path) if path.exists() => Ok(path),
        _ => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let found = std::env::split_paths(&path)
                .map(|dir| dir.join("helm"))
                .find(|path| path.exists());
            found.ok_or_else(|| {
                say("check-tools")
                    .err()
                    .unwrap_or_else(|| "there is no helm".to_owned())
            })
        }
    }
}

/// Runs helm on the chart with its caches in the test's folder.
fn run_helm(test: &Test, args: &[&str], values: &Value) -> Output {
    let file = test.dir().join("values.yaml");
    std::fs::write(&file, values.to_string()).expect("the values can be written");
    let (action, rest) = args.split_first().expect("an action");
    let program = helm().expect("helm was there a moment ago");
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
    let documents = text.split("\n---").map(|document| {
        let value: Value = serde_yaml::from_str(document).unwrap_or_else(|error| panic!("{error}:\n{document}"));
        value
    });
    let objects = documents.filter(|document| !document.is_null()).collect();
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
    write_schemas(&test, &folder).await;
    let location = format!(
        "{}/{{{{.ResourceKind}}}}_{{{{.Group}}}}_{{{{.ResourceAPIVersion}}}}.json",
        folder.display()
    );
    let program = helm()
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

/// Applies the chart without its definitions, which all suites share; the name of its service account.
async fn install(test: &Test, values: Value) -> String {
    let (text, objects) = render(test, &values);
    test.apply(&text).await;
    let account = &of_kind(&objects, "ServiceAccount")[0]["metadata"]["name"];
    account.as_str().unwrap_or_default().to_owned()
}

/// Takes away what [`install`] left outside the test's namespace.
async fn uninstall_cluster_wide(test: &Test) {
    let release = format!("app.kubernetes.io/instance={}", test.unique("chart"));
    let args = ["delete", "clusterrole,clusterrolebinding", "-l", &release];
    let done = test.kube().kubectl(&args).await;
    done.expect("the cluster-wide roles can be deleted");
}

async fn may(test: &Test, account: &str, namespace: &str, verb: &str, resource: &str) -> bool {
    let user = format!("system:serviceaccount:{}:{account}", test.namespace());
    let args = ["auth", "can-i", verb, resource, "-n", namespace, "--as", &user];
    // "no" ends with 1, and so does an error: the caller asks for something allowed, too
    test.kube().kubectl(&args).await.is_ok()
}

async fn the_rights_of_the_chart_are_those_that_it_names_and_no_others(test: Test) {
    let here = test.namespace();
    let account = install(&test, json!({"crds": {"enabled": false}, "namespaces": [here]})).await;
    for (verb, resource) in [
        ("get", "secrets"),
        ("watch", "instanceplacements.berth.dev"),
        ("create", "instancemoves.berth.dev"),
        ("delete", "instancemoves.berth.dev"),
        ("patch", "instanceplacements.berth.dev/status"),
        ("get", "customresourcedefinitions/instanceservers.berth.dev"),
    ] {
        assert!(
            may(&test, &account, &here, verb, resource).await,
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
            !may(&test, &account, &here, verb, resource).await,
            "{verb} {resource} is refused"
        );
    }
    for (verb, resource) in [("get", "secrets"), ("list", "instanceplacements.berth.dev")] {
        assert!(
            !may(&test, &account, "default", verb, resource).await,
            "{verb} {resource} elsewhere"
        );
    }
    uninstall_cluster_wide(&test).await;

    let values = json!({"crds": {"enabled": false}, "trustTokens": {"enabled": true}});
    let account = install(&test, values).await;
    assert!(
        may(&test, &account, "default", "list", "instanceplacements.berth.dev").await,
        "everywhere"
    );
    assert!(
        may(&test, &account, &here, "create", "secrets").await,
        "for trust tokens"
    );
    assert!(
        !may(&test, &account, &here, "list", "secrets").await,
        "never all secrets"
    );
    uninstall_cluster_wide(&test).await;
}

/// A kubeconfig that logs in as the chart's service account.
async fn kubeconfig_of(test: &Test, account: &str) -> PathBuf {
    let namespace = test.namespace();
    let args = ["create", "token", account, "-n", &namespace];
    let token = test.kube().kubectl(&args).await.expect("the account gets a token");
    let text = std::fs::read_to_string(test.kube().kubeconfig()).expect("the admin's kubeconfig can be read");
    let mut config: Value = serde_yaml::from_str(&text).expect("it is YAML");
    config["users"][0]["user"] = json!({"token": token.trim()});
    let path = test.dir().join("kubeconfig");
    std::fs::write(&path, config.to_string()).expect("a kubeconfig can be written");
    path
}

async fn the_rights_of_the_chart_are_enough_for_a_move(test: Test) {
    let values = json!({"crds": {"enabled": false}, "namespaces": [test.namespace()]});
    let account = install(&test, values).await;
    let deployment = of_kind(&render(&test, &json!({})).1, "Deployment")[0].clone();
    let args = deployment["spec"]["template"]["spec"]["containers"][0]["args"].clone();
    // the Lease may be written under the name that the chart gives it, and no other
    let lease = args.as_array().into_iter().flatten().filter_map(Value::as_str);
    let lease = lease.filter(|arg| arg.starts_with("--lease-name=")).map(str::to_owned);
    let options = ControllerOptions {
        leader_election: true,
        kubeconfig: Some(kubeconfig_of(&test, &account).await),
        args: lease.collect(),
        ..ControllerOptions::default()
    };
    let controller = test.controller_with(options).await;

    let name = test.unique("web");
    test.lab().server("i1").create(&name, &NewInstance::default()).await;
    test.add_servers(&["i1", "i2"]).await;
    test.place(&Placement::new(&name, "i2")).await;
    let placement = test.wait_in_place(&name, "i2", Duration::from_secs(60)).await;
    assert_eq!(condition(&placement, "Stalled"), None);
    assert!(!test.events(&name).await.is_empty(), "events are written");
    let log = controller.log();
    assert!(!log.contains("forbidden"), "something is refused: {log}");
    uninstall_cluster_wide(&test).await;
}
