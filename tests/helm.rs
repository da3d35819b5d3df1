//! The life of a release with the real Helm: installed, upgraded from the chart before, uninstalled, at rest and with a move
//! in flight. Nothing is lost, and nothing that is not the user's is left.
//!
//! The definitions belong to the release, so these tests have a control plane of their own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use berth_tests::{Controller, ControllerOptions, SOON, Test, objects_of, one_of_kind, wait_for};
use serde_json::{Value, json};

use road::{Call, Road, Subject, Watch, intact, subject, with_data};

mod road;

berth_tests::suite! {
    needs: [BareKube, Lab, Helm],
    together: [],
    // one release after the other: the definitions are there once
    alone: [
        an_installed_release_moves_an_instance_and_its_uninstallation_leaves_what_users_made,
        an_upgrade_and_an_uninstallation_in_mid_move_lose_nothing,
    ],
}

const KINDS: &str = "instanceservers,instanceplacements,instancemoves,instancecopies";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent")
}

/// The release `berth` in a namespace of its own, beside the namespace that its users work in.
struct Release {
    test: Test,
    namespace: String,
}

impl Release {
    /// None yet, and nothing of an earlier one.
    async fn none(test: &Test) -> Release {
        let release = Release {
            test: test.clone(),
            // has the test's letters
            namespace: test.unique("berth"),
        };
        release
            .kubectl(&["delete", "crd", "-l", "app.kubernetes.io/name=berth"])
            .await;
        release
    }

    async fn kubectl(&self, args: &[&str]) -> String {
        let done = self.test.kube().kubectl(args).await;
        done.unwrap_or_else(|error| panic!("kubectl {args:?}: {error}"))
    }

    async fn helm(&self, args: &[&str]) -> String {
        let all = [args, &["--namespace", &self.namespace]].concat();
        let done = self.test.helm(&all).await;
        done.unwrap_or_else(|error| panic!("{error}"))
    }

    async fn install(&self, chart: &Path) {
        let chart = chart.display().to_string();
        self.helm(&["install", "berth", &chart, "--create-namespace"]).await;
        self.established().await;
    }

    async fn upgrade(&self, chart: &Path, values: &[&str]) {
        let chart = chart.display().to_string();
        self.helm(&[&["upgrade", "berth", &chart][..], values].concat()).await;
    }

    async fn established(&self) {
        let such = ["crd", "-l", "app.kubernetes.io/name=berth", "--timeout=60s"];
        self.kubectl(&[&["wait", "--for=condition=established"][..], &such].concat())
            .await;
    }

    async fn objects(&self) -> Vec<Value> {
        objects_of(&self.helm(&["get", "manifest", "berth"]).await)
    }

    /// The one pod that a cluster would run now.
    async fn pod(&self) -> Controller {
        let options = self.test.as_rendered(&self.objects().await, &self.namespace).await;
        self.test.controller_with(options).await
    }

    /// What users made: kind, name and uid of each object of ours.
    async fn made_by_users(&self) -> Vec<String> {
        let columns = "-o=custom-columns=K:.kind,N:.metadata.name,U:.metadata.uid";
        let namespace = self.test.namespace();
        let text = self
            .kubectl(&["get", KINDS, "-n", &namespace, "--no-headers", columns])
            .await;
        text.lines().map(str::to_owned).collect()
    }

    /// Uninstalls; no object of the release is there any more but the definitions, if they are kept.
    async fn uninstall(&self, kept: usize) {
        let before = self.made_by_users().await;
        self.helm(&["uninstall", "berth"]).await;
        let kube = self.test.kube();
        let such = ["-A", "-l=app.kubernetes.io/instance=berth", "-o=name"];
        wait_for(
            "the objects of the release to be gone",
            Duration::from_secs(60),
            || async {
                // anew each time: of kinds that go, too, there is nothing to get
                let kinds = kube.kubectl(&["api-resources", "--verbs=list", "-o=name"]).await?;
                let kinds = kinds.split_whitespace().collect::<Vec<_>>().join(",");
                let left = kube.kubectl(&[&["get", &kinds][..], &such].concat()).await?;
                let others = left
                    .lines()
                    .filter(|line| !line.starts_with("customresourcedefinition."));
                match (others.count(), left.lines().count()) {
                    (0, all) if all == kept => Ok(()),
                    _ => Err(left),
                }
            },
        )
        .await;
        let left = self
            .kubectl(&["get", "secrets,configmaps", "-n", &self.namespace, "-o=name"])
            .await;
        assert!(
            !left.contains("helm"),
            "helm's own record of the release is gone: {left}"
        );
        if kept > 0 {
            assert_eq!(self.made_by_users().await, before, "users' objects are as they were");
        }
    }
}

/// The chart of this checkout.
fn this_chart() -> PathBuf {
    root().join("charts/berth")
}

fn definitions(chart: &Path) -> Vec<PathBuf> {
    let folder = std::fs::read_dir(chart.join("files/crds")).expect("the chart has definitions");
    folder.map(|file| file.expect("a file").path()).collect()
}

fn read_yaml(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_yaml::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn runs(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// The chart of a commit in `folder`, if there is one, it differs from this one, and this program can work with it.
fn unpacked(commit: &str, folder: &Path) -> Option<PathBuf> {
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder).ok()?;
    let tar = folder.join("chart.tar");
    let output = format!("--output={}", tar.display());
    let archive = ["archive", "--format=tar", &output, commit, "charts/berth"];
    if !runs(Command::new("git").args(archive).current_dir(root()))
        || !runs(Command::new("tar").arg("-xf").arg(&tar).current_dir(folder))
    {
        return None;
    }
    let chart = folder.join("charts/berth");
    let same = runs(Command::new("diff").arg("-rq").arg(&chart).arg(this_chart()));
    let number = |chart: &Path| {
        let file = chart.join("files/crds/instancemoves.yaml");
        file.exists()
            .then(|| read_yaml(&file)["metadata"]["annotations"]["berth.dev/schema"].clone())
    };
    // an older number means that this program would not lead, and the program of then is not at hand
    (!same && number(&chart) == number(&this_chart())).then_some(chart)
}

/// The chart as it was before it was changed last. Where there is no history, or none that this program can work with, it
/// is this one. Either has definitions without their last column, so that an upgrade has something to do.
fn previous_chart(test: &Test) -> PathBuf {
    let log = ["log", "--format=%H^", "--max-count=10", "--", "charts/berth"];
    let log = Command::new("git").args(log).current_dir(root()).output();
    let log = log.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let folder = test.dir().join("previous");
    let commits = log.unwrap_or_default();
    let mut commits = std::iter::once("HEAD").chain(commits.split_whitespace());
    let chart = commits.find_map(|commit| unpacked(commit, &folder));
    let chart = chart.unwrap_or_else(|| {
        eprintln!("helm: there is no older chart to upgrade from; this one stands for it");
        assert!(
            runs(
                Command::new("cp")
                    .arg("-r")
                    .arg(this_chart())
                    .arg(test.dir().join("chart"))
            ),
            "the chart can be copied"
        );
        test.dir().join("chart")
    });
    for file in definitions(&chart) {
        let mut crd = read_yaml(&file);
        let columns = crd["spec"]["versions"][0]["additionalPrinterColumns"].as_array_mut();
        columns.expect("there are columns").pop();
        let text = serde_yaml::to_string(&crd).expect("a definition is YAML");
        std::fs::write(&file, text).expect("a definition can be written");
    }
    chart
}

/// How many columns each installed definition has.
async fn columns(release: &Release) -> Vec<usize> {
    let list = ["get", "crd", "-l", "app.kubernetes.io/name=berth", "-o", "json"];
    let list: Value = serde_json::from_str(&release.kubectl(&list).await).expect("JSON");
    let columns = |crd: &Value| {
        crd["spec"]["versions"][0]["additionalPrinterColumns"]
            .as_array()
            .map(Vec::len)
    };
    let all = list["items"].as_array().into_iter().flatten();
    all.map(|crd| columns(crd).unwrap_or_default()).collect()
}

/// As a kubelet ends a pod.
async fn end(controller: &Controller) {
    let status = controller.term().await;
    assert!(status.success(), "the controller ends as it should: {status}");
}

/// No object of users carries a finalizer: all can be deleted without a controller.
async fn nothing_holds_them(release: &Release) {
    let namespace = release.test.namespace();
    let list = release.kubectl(&["get", KINDS, "-n", &namespace, "-o", "json"]).await;
    let list: Value = serde_json::from_str(&list).expect("JSON");
    for object in list["items"].as_array().into_iter().flatten() {
        let held = object["metadata"].get("finalizers");
        assert_eq!(held, None, "{} {}", object["kind"], object["metadata"]["name"]);
    }
}

/// An instance on i1 with its placement.
async fn web(test: &Test) -> (Road, Subject) {
    let road = Road::between(test, "i1", "i2").await;
    let web = subject(test, "i1", "web", &with_data("default")).await;
    (road, web)
}

async fn an_installed_release_moves_an_instance_and_its_uninstallation_leaves_what_users_made(test: Test) {
    let release = Release::none(&test).await;
    release.install(&this_chart()).await;
    let controller = release.pod().await;
    let (_road, web) = web(&test).await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    test.retarget(&web.name, json!({"server": "i2"})).await;
    intact(&test, &web, "i2", 2..=2).await;

    let objects = release.objects().await;
    let limits =
        &one_of_kind(&objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"];
    assert_eq!(limits["memory"], "256Mi", "the limit that is looked at");
    assert!(
        controller.peak_memory() < 256 << 20,
        "{} bytes",
        controller.peak_memory()
    );
    let log = controller.log();
    assert!(!log.contains("forbidden"), "something is refused: {log}");

    // as docs/operations.md says: no move is in flight
    let ended = "--for=jsonpath={.status.outcome}";
    release
        .kubectl(&["wait", "imove", "--all", "-A", ended, "--timeout=60s"])
        .await;
    // Helm removes all at once, the pod ends when it has noticed
    release.uninstall(4).await;
    end(&controller).await;
    nothing_holds_them(&release).await;

    // what was kept is taken over by the next release of that name, which finds all as it was
    release.install(&this_chart()).await;
    let controller = release.pod().await;
    test.retarget(&web.name, json!({"server": "i1"})).await;
    intact(&test, &web, "i1", 3..=3).await;

    // all of it: the definitions and with them the objects, but no instance
    release.upgrade(&this_chart(), &["--set", "crds.keep=false"]).await;
    end(&controller).await;
    release.uninstall(0).await;
    let here = test.lab().whereabouts(&web.name).await;
    assert_eq!(
        here,
        [("i1".to_owned(), "Running".to_owned())],
        "instances are left alone"
    );
}

async fn an_upgrade_and_an_uninstallation_in_mid_move_lose_nothing(test: Test) {
    let release = Release::none(&test).await;
    let previous = previous_chart(&test);
    release.install(&previous).await;
    let older = columns(&release).await;
    // the program of then is not at hand: this one runs as that Deployment says, with all rights, since those of then
    // were for the program of then
    let as_rendered = test.as_rendered(&release.objects().await, &release.namespace).await;
    let before = test
        .controller_with(ControllerOptions {
            kubeconfig: None,
            ..as_rendered
        })
        .await;
    let (road, web) = web(&test).await;
    let watch = Watch::begin(&road, std::slice::from_ref(&web));
    test.wait_in_place(&web.name, "i1", SOON).await;
    road.catch(&[(Call::Create, &web.name)]);
    test.retarget(&web.name, json!({"server": "i2"})).await;
    road.caught().await;

    // stopped and guarded here, not yet there
    release.upgrade(&this_chart(), &[]).await;
    let newer = columns(&release).await;
    assert!(
        older.iter().zip(&newer).all(|(old, new)| old < new),
        "{older:?}, {newer:?}"
    );
    let after = release.pod().await;
    end(&before).await;
    road.pass();
    intact(&test, &web, "i2", 2..=2).await;
    assert_eq!(test.moves(&web.name).await.len(), 1, "one move, not another attempt");

    road.catch(&[(Call::Create, &web.name)]);
    test.retarget(&web.name, json!({"server": "i1"})).await;
    road.caught().await;
    release.uninstall(4).await;
    end(&after).await;
    road.pass();
    let source = test.lab().server("i2");
    assert_eq!(source.status(&web.name).await, "Stopped", "nobody ends the move");
    assert!(source.try_state(&web.name, "start").await.is_err(), "it is guarded");
    // the record says how it goes on: whoever installs Berth again has the move ended
    release.install(&this_chart()).await;
    let again = release.pod().await;
    intact(&test, &web, "i1", 3..=3).await;
    assert_eq!(test.moves(&web.name).await.len(), 2, "no other attempt");
    release.uninstall(4).await;
    end(&again).await;
    nothing_holds_them(&release).await;
    watch.end();
}
