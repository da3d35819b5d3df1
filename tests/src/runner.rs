//! Runs a suite: sentence names, a substring as filter, tests side by side, logs kept for those that fail.
//!
//! Names on the command line and the summary line are libtest's, so `cargo test` users find nothing new.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use tokio::sync::RwLock;

use crate::controller::{Controller, ControllerOptions};
use crate::gitops::Tool;
use crate::helm::helm_program;
use crate::kube::Kube;
use crate::lab::{self, Lab};
use crate::machine;
use crate::recorder::Recorder;
use crate::shared;

/// What a suite cannot run without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// A Kubernetes control plane with the project's definitions.
    Kube,
    /// One of the suite's own without them, instead of [`Needs::Kube`].
    BareKube,
    /// Helm.
    Helm,
    /// Incus and LXD servers.
    Lab,
    /// Incus and LXD servers that can run virtual machines, instead of [`Needs::Lab`].
    Vms,
    /// Incus servers that can move the processes of containers, instead of [`Needs::Lab`]: i1, i2, t1, t2, and t3, which owns
    /// the files of containers without idmapped mounts.
    Criu,
    /// Flux, on the control plane.
    Flux,
    /// Argo CD, on the control plane.
    Argo,
}

impl Needs {
    fn what_is_missing(self) -> Option<String> {
        match self {
            Needs::Kube | Needs::BareKube => Kube::what_is_missing(),
            Needs::Helm => helm_program().err(),
            Needs::Lab => Lab::what_is_missing(lab::Kind::Containers),
            Needs::Vms => Lab::what_is_missing(lab::Kind::Vms),
            Needs::Criu => Lab::what_is_missing(lab::Kind::Criu),
            Needs::Flux => Tool::Flux.what_is_missing(),
            Needs::Argo => Tool::Argo.what_is_missing(),
        }
    }
}

/// The lab that these needs ask for.
fn lab_of(needs: &[Needs]) -> Option<lab::Kind> {
    if needs.contains(&Needs::Vms) {
        return Some(lab::Kind::Vms);
    }
    if needs.contains(&Needs::Criu) {
        return Some(lab::Kind::Criu);
    }
    needs.contains(&Needs::Lab).then_some(lab::Kind::Containers)
}

tokio::task_local! {
    /// Where the test of this task panicked.
    static PANIC: Arc<Mutex<Option<String>>>;
}

static GATE: machine::Gate = machine::Gate::new();

type Body = Box<dyn Fn(Test) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

struct Entry {
    name: String,
    alone: bool,
    incus7: bool,
    body: Body,
}

/// A list of tests that becomes a program; usually written with [`suite!`](crate::suite).
pub struct Suite {
    name: &'static str,
    needs: Vec<Needs>,
    timeout: Duration,
    side_by_side: usize,
    tests: Vec<Entry>,
}

impl Suite {
    /// An empty suite.
    pub fn new(name: &'static str, needs: &[Needs]) -> Suite {
        let needs = needs.to_vec();
        Suite {
            name,
            needs,
            timeout: Duration::from_secs(600),
            side_by_side: 4,
            tests: Vec::new(),
        }
    }

    /// How long one test may take (default 600 s).
    pub fn timeout(mut self, timeout: Duration) -> Suite {
        self.timeout = timeout;
        self
    }

    /// How many tests run side by side at most (default 4), fewer while the machine is busy; `--test-threads` overrides it.
    pub fn side_by_side(mut self, count: usize) -> Suite {
        self.side_by_side = count;
        self
    }

    /// Adds a test that does not mind company.
    pub fn together<F>(self, name: &str, body: impl Fn(Test) -> F + Send + Sync + 'static) -> Suite
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.add(name, (false, false), body)
    }

    /// Adds a test that must have the servers for itself, e.g. because it kills one.
    pub fn alone<F>(self, name: &str, body: impl Fn(Test) -> F + Send + Sync + 'static) -> Suite
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.add(name, (true, false), body)
    }

    /// Adds a test that needs the Incus 7 servers t1 and t2 too; it is skipped where the lab has none.
    pub fn incus7<F>(self, name: &str, body: impl Fn(Test) -> F + Send + Sync + 'static) -> Suite
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.add(name, (false, true), body)
    }

    fn add<F>(
        mut self,
        name: &str,
        (alone, incus7): (bool, bool),
        body: impl Fn(Test) -> F + Send + Sync + 'static,
    ) -> Suite
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let name = name.rsplit("::").next().unwrap_or(name).replace('_', " ");
        self.tests.push(Entry {
            name,
            alone,
            incus7,
            body: Box::new(move |test| Box::pin(body(test))),
        });
        self
    }

    /// Runs what the command line asks for.
    pub fn main(self) -> ExitCode {
        let mut arguments = Arguments::from_args();
        std::panic::set_hook(Box::new(remember_panic));
        arguments.test_threads.get_or_insert(self.side_by_side);
        let missing = if arguments.list { None } else { self.what_is_missing() };
        if let Some(reason) = &missing {
            eprintln!("{}: skipped, {reason}", self.name);
        }
        let asked = missing.is_none() && !arguments.list && self.tests.iter().any(|t| t.incus7);
        let no_incus7 = asked.then(Lab::what_is_missing_for_incus7).flatten();
        if let Some(reason) = &no_incus7 {
            eprintln!("{}: tests with Incus 7 skipped, {reason}", self.name);
        }
        if missing.is_none() && !arguments.list {
            machine::watch(shared::work_dir());
        }
        let company = Arc::new(RwLock::new(()));
        let (suite, needs, timeout) = (self.name, self.needs, self.timeout);
        let trials = self.tests.into_iter().map(|entry| {
            let Entry {
                name,
                alone,
                incus7,
                body,
            } = entry;
            let (company, needs, sentence) = (Arc::clone(&company), needs.clone(), name.clone());
            Trial::test(name, move || {
                shared::RUNTIME.block_on(run_one(
                    Plan {
                        suite,
                        sentence,
                        alone,
                        needs,
                        timeout,
                    },
                    &company,
                    body,
                ))
            })
            .with_ignored_flag(missing.is_some() || incus7 && no_incus7.is_some())
        });
        let conclusion = libtest_mimic::run(&arguments, trials.collect());
        shared::end_servers();
        conclusion.exit_code()
    }

    fn what_is_missing(&self) -> Option<String> {
        self.needs.iter().find_map(|need| need.what_is_missing())
    }
}

struct Plan {
    suite: &'static str,
    sentence: String,
    alone: bool,
    needs: Vec<Needs>,
    timeout: Duration,
}

async fn run_one(plan: Plan, company: &RwLock<()>, body: Body) -> Result<(), Failed> {
    // whoever waits for solitude lets no newcomer in
    let (_reader, _writer) = if plan.alone {
        (None, Some(company.write().await))
    } else {
        (Some(company.read().await), None)
    };
    let _entered = GATE.enter().await;
    let dir = shared::work_dir()
        .join(plan.suite)
        .join(plan.sentence.replace(' ', "-"));
    let _ = std::fs::remove_dir_all(&dir);
    let test = match guarded(Test::new(plan.sentence, dir, plan.needs)).await {
        Ok(test) => test,
        Err(text) => return Err(Failed::from(text)),
    };
    let begun = Instant::now();
    let outcome = tokio::time::timeout(plan.timeout, guarded(body(test.clone()))).await;
    let outcome = outcome.unwrap_or_else(|_| Err(format!("did not end within {:?}", plan.timeout)));
    let outcome = outcome.and_then(|()| test.keeps_the_rules());
    let story = match &outcome {
        Err(_) if test.inner.kube.is_some() => {
            let test = test.clone();
            guarded(async move { test.story().await })
                .await
                .unwrap_or_else(|error| error)
        }
        Err(_) | Ok(()) => String::new(),
    };
    let machine = machine::since(begun);
    test.end(outcome.is_err()).await;
    let logs = test.dir().display();
    outcome.map_err(|text| Failed::from(format!("{text}\n{machine}\n{story}\nlogs: {logs}")))
}

/// Runs a part of a test; a panic in it becomes an error that says where.
async fn guarded<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, String> {
    let place = Arc::new(Mutex::new(None));
    let task = tokio::spawn(PANIC.scope(Arc::clone(&place), work));
    // a test that takes too long must not go on beside the next one
    let abort = AbortOnDrop(task.abort_handle());
    let outcome = task.await;
    drop(abort);
    outcome.map_err(|error| {
        let said = place.lock().unwrap_or_else(PoisonError::into_inner).take();
        said.unwrap_or_else(|| error.to_string())
    })
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// In a test: keeps the sentence for the report. Elsewhere: prints it, there is no report.
fn remember_panic(info: &std::panic::PanicHookInfo<'_>) {
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let text = format!("{place}: {}", info.payload_as_str().unwrap_or("panicked"));
    let kept = PANIC.try_with(|slot| {
        slot.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(text.clone());
    });
    if kept.is_err() {
        eprintln!("{text}");
    }
}

fn namespace_of(id: &str) -> String {
    format!("test-{id}")
}

/// One running test: its servers, its namespace, its names, its folder for logs.
#[derive(Clone)]
pub struct Test {
    inner: Arc<Inner>,
}

struct Inner {
    sentence: String,
    id: String,
    dir: PathBuf,
    kube: Option<&'static Kube>,
    lab: Option<&'static Lab>,
    argo: bool,
    controllers: Mutex<Vec<Controller>>,
    recorder: Option<Recorder>,
}

impl Test {
    async fn new(sentence: String, dir: PathBuf, needs: Vec<Needs>) -> Test {
        std::fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("cannot make {}: {error}", dir.display()));
        let id = shared::random_letters(5);
        let kube = match (needs.contains(&Needs::Kube), needs.contains(&Needs::BareKube)) {
            (_, true) => Some(Kube::bare().await),
            (true, false) => Some(Kube::shared().await),
            (false, false) => None,
        };
        let lab = match lab_of(&needs) {
            Some(kind) => Some(Lab::shared(kind).await),
            None => None,
        };
        let recorder = match kube {
            Some(kube) => {
                let namespace = namespace_of(&id);
                kube.create_namespace(&namespace).await;
                Some(Recorder::start(|kind| kube.api(kind, &namespace)).await)
            }
            None => None,
        };
        Test {
            inner: Arc::new(Inner {
                sentence,
                id,
                dir,
                kube,
                lab,
                argo: needs.contains(&Needs::Argo),
                controllers: Mutex::new(Vec::new()),
                recorder,
            }),
        }
    }

    /// What has been seen of this test's objects. The suite must name [`Needs::Kube`].
    pub fn recorder(&self) -> &Recorder {
        self.inner.recorder.as_ref().expect("the suite names Needs::Kube")
    }

    /// Whatever a test is about, no object of it ever said what it must not.
    fn keeps_the_rules(&self) -> Result<(), String> {
        let Some(recorder) = &self.inner.recorder else {
            return Ok(());
        };
        let violations = recorder.violations();
        if violations.is_empty() {
            return Ok(());
        }
        let _ = std::fs::write(self.dir().join("versions.jsonl"), recorder.dump());
        Err(format!("what objects said: {}", violations.join("\n")))
    }

    /// The sentence that this test proves.
    pub fn sentence(&self) -> &str {
        &self.inner.sentence
    }

    /// Folder for logs; kept if the test fails.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// The control plane. The suite must name [`Needs::Kube`].
    pub fn kube(&self) -> &'static Kube {
        self.inner.kube.expect("the suite names Needs::Kube")
    }

    /// The servers. The suite must name [`Needs::Lab`].
    pub fn lab(&self) -> &'static Lab {
        self.inner.lab.expect("the suite names Needs::Lab")
    }

    /// This test's own namespace.
    pub fn namespace(&self) -> String {
        namespace_of(&self.inner.id)
    }

    /// `name` with letters that belong to this test alone; instances so named are deleted when it ends.
    pub fn unique(&self, name: &str) -> String {
        format!("{name}-{}", self.inner.id)
    }

    /// Starts a controller for this test's namespace, without leader election.
    pub async fn controller(&self) -> Controller {
        self.controller_with(ControllerOptions::default()).await
    }

    /// Starts a controller and waits until it is ready; it is killed when the test ends.
    pub async fn controller_with(&self, options: ControllerOptions) -> Controller {
        let number = self.controllers().len() + 1;
        let controller = Controller::start(self, number, options).await;
        self.controllers().push(controller.clone());
        controller
    }

    fn controllers(&self) -> std::sync::MutexGuard<'_, Vec<Controller>> {
        self.inner.controllers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn end(&self, failed: bool) {
        let controllers = std::mem::take(&mut *self.controllers());
        for controller in controllers {
            controller.kill().await;
        }
        if failed && std::env::var_os("BERTH_KEEP").is_some() {
            return;
        }
        if failed && let Some(kube) = self.inner.kube {
            let _ = std::fs::write(self.dir().join("objects.yaml"), kube.dump(&self.namespace()).await);
        }
        if let Some(kube) = self.inner.kube.filter(|_| self.inner.argo) {
            kube.delete_applications(&self.namespace()).await;
        }
        if let Some(lab) = self.inner.lab {
            if failed {
                lab.copy_logs(self.dir());
            }
            lab.delete_instances_of(&self.inner.id).await;
        }
        if let Some(kube) = self.inner.kube {
            kube.delete_namespace(&self.namespace()).await;
        }
        if !failed {
            let _ = std::fs::remove_dir_all(self.dir());
        }
    }
}

/// The `main` of a suite:
/// ```ignore
/// berth_tests::suite! {
///     needs: [Kube, Lab],
///     together: [a_running_container_moves],       // run side by side
///     alone: [the_daemon_of_the_target_is_killed], // have the servers for themselves
///     incus7: [it_moves_to_a_newer_incus],         // also run side by side, skipped where there is no Incus 7; may be left out
/// }
/// ```
#[macro_export]
macro_rules! suite {
    (needs: [$($need:ident),* $(,)?], $(timeout: $timeout:expr,)? $(side_by_side: $count:expr,)?
     together: [$($together:path),* $(,)?], alone: [$($alone:path),* $(,)?]
     $(, incus7: [$($incus7:path),* $(,)?])? $(,)?) => {
        fn main() -> ::std::process::ExitCode {
            $crate::Suite::new(env!("CARGO_CRATE_NAME"), &[$($crate::Needs::$need),*])
                $(.timeout($timeout))?
                $(.side_by_side($count))?
                $(.together(stringify!($together), $together))*
                $(.alone(stringify!($alone), $alone))*
                $($(.incus7(stringify!($incus7), $incus7))*)?
                .main()
        }
    };
}
