//! The controller as a process: started, paused, killed; its log is kept for failing tests.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, OnceCell};

use crate::{Test, shared, wait_for};

static BINARY: OnceCell<PathBuf> = OnceCell::const_new();

/// How to start a controller.
#[derive(Clone, Debug, Default)]
pub struct ControllerOptions {
    /// Take part in the election of a leader, over a Lease in the test's namespace.
    pub leader_election: bool,
    /// Do not wait until it is ready, e.g. because it will not lead.
    pub no_wait: bool,
    /// Kubeconfig to use instead of the cluster admin's.
    pub kubeconfig: Option<PathBuf>,
    /// Further arguments of `berth controller`.
    pub args: Vec<String>,
    /// All arguments but its listener's address, instead of the usual ones; `args` are not looked at then.
    pub command: Option<Vec<String>>,
    /// Further environment.
    pub env: Vec<(String, String)>,
}

/// A running `berth controller`.
#[derive(Clone)]
pub struct Controller {
    child: Arc<Mutex<Child>>,
    pid: u32,
    port: u16,
    log: PathBuf,
}

/// The program under test: `BERTH_BIN`, or what cargo builds now.
async fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("BERTH_BIN") {
        return PathBuf::from(path);
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--quiet", "--package", "berth", "--bin", "berth"])
        .current_dir(shared::root());
    shared::run(command)
        .await
        .unwrap_or_else(|error| panic!("berth does not build: {error}"));
    shared::target_dir().join("debug/berth")
}

impl Controller {
    pub(crate) async fn start(test: &Test, number: usize, options: ControllerOptions) -> Controller {
        let program = BINARY.get_or_init(binary).await;
        let log = test.dir().join(format!("controller-{number}.log"));
        let file = std::fs::File::create(&log).unwrap_or_else(|error| panic!("{}: {error}", log.display()));
        let errors = file
            .try_clone()
            .unwrap_or_else(|error| panic!("{}: {error}", log.display()));
        let port = free_port();
        let namespace = test.namespace();
        let mut command = Command::new(program);
        match &options.command {
            Some(all) => command.args(all),
            None => command
                .args(["controller", "--namespace", &namespace, "--lease-namespace", &namespace])
                .arg(format!("--leader-elect={}", options.leader_election))
                .args(&options.args),
        };
        command
            .arg(format!("--listen-address=127.0.0.1:{port}"))
            .env(
                "KUBECONFIG",
                options.kubeconfig.clone().unwrap_or_else(|| test.kube().kubeconfig()),
            )
            .env(
                "RUST_LOG",
                std::env::var("BERTH_TEST_LOG").unwrap_or_else(|_| "info,berth=debug".to_owned()),
            )
            .envs(options.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .kill_on_drop(true);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
        let pid = child.id().unwrap_or_default();
        let controller = Controller {
            child: Arc::new(Mutex::new(child)),
            pid,
            port,
            log,
        };
        if !options.no_wait {
            controller.wait_ready().await;
        }
        controller
    }

    /// Waits until `/readyz` says 200.
    pub async fn wait_ready(&self) {
        wait_for("the controller to be ready", Duration::from_secs(60), || async {
            if let Ok(Some(status)) = self.child.lock().await.try_wait() {
                panic!("the controller ended ({status}); log: {}", self.log.display());
            }
            match self.http_get("/readyz").await {
                Ok(answer) if answer.starts_with("HTTP/1.1 200") => Ok(()),
                Ok(answer) => Err(answer),
                Err(error) => Err(error.to_string()),
            }
        })
        .await;
    }

    /// GET of its own listener, e.g. `/metrics`: status line, headers and body as they come.
    pub async fn http_get(&self, path: &str) -> std::io::Result<String> {
        use tokio::io::AsyncReadExt;
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    async fn signal(&self, signal: &str) {
        let mut command = Command::new("kill");
        command.arg(format!("-{signal}")).arg(self.pid.to_string());
        shared::run(command)
            .await
            .unwrap_or_else(|error| panic!("signal to the controller: {error}"));
    }

    /// SIGKILL; returns when it is gone. Fine to repeat.
    pub async fn kill(&self) {
        let mut child = self.child.lock().await;
        let _ = child.start_kill();
        let _ = child.wait().await;
    }

    /// SIGSTOP: it does nothing more until [`Controller::cont`].
    pub async fn stop(&self) {
        self.signal("STOP").await;
    }

    /// SIGCONT.
    pub async fn cont(&self) {
        self.signal("CONT").await;
    }

    /// SIGTERM; returns the exit status, and fails after 30 s.
    pub async fn term(&self) -> std::process::ExitStatus {
        self.signal("TERM").await;
        let mut child = self.child.lock().await;
        let ended = tokio::time::timeout(Duration::from_secs(30), child.wait()).await;
        let ended = ended.unwrap_or_else(|_| panic!("the controller did not end within 30 s of SIGTERM"));
        ended.unwrap_or_else(|error| panic!("waiting for the controller: {error}"))
    }

    /// Waits until it ends by itself, e.g. at a crash point it was given; fails after `within`.
    pub async fn wait_end(&self, within: Duration) -> std::process::ExitStatus {
        let mut child = self.child.lock().await;
        let ended = tokio::time::timeout(within, child.wait()).await;
        let ended = ended.unwrap_or_else(|_| panic!("the controller did not end by itself within {within:?}"));
        ended.unwrap_or_else(|error| panic!("waiting for the controller: {error}"))
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Port of its listener on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The most memory that it has had so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or_else(|| panic!("the controller has ended: {status:?}")) << 10
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Path of its log.
    pub fn log_path(&self) -> &Path {
        &self.log
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    listener.unwrap_or_else(|error| panic!("no free port: {error}")).port()
}
