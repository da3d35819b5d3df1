//! The Incus and LXD servers of a test run: where they are, how to ask them, how to break them.

use std::path::{Path, PathBuf};

use hyper::Method;
use serde::Deserialize;
use serde_json::Value;
use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::rest::{self, ApiError};
use crate::shared;
use crate::vm::{Ticks, Vms};

static SHARED: OnceCell<Lab> = OnceCell::const_new();
static SHARED_VMS: OnceCell<Lab> = OnceCell::const_new();
static SHARED_CRIU: OnceCell<Lab> = OnceCell::const_new();

/// All servers of a run.
pub struct Lab {
    dir: PathBuf,
    id: u16,
    client_cert: PathBuf,
    client_key: PathBuf,
    servers: Vec<Server>,
    vms: Option<(Vms, Ticks)>,
}

/// Which lab a suite stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Servers for containers, shared by all suites of a run.
    Containers,
    /// Servers that can run virtual machines, too; started by the suites that need them.
    Vms,
    /// Servers that can move the processes of containers; likewise.
    Criu,
}

/// Whose server it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Product {
    /// Incus.
    Incus,
    /// LXD.
    Lxd,
}

/// One server, or one member of a cluster.
#[derive(Clone, Debug, Deserialize)]
pub struct Server {
    /// Its name in the lab, which is also its host name and its remote for the command line.
    pub name: String,
    /// Incus or LXD.
    #[serde(rename = "kind")]
    pub product: Product,
    /// e.g. `6.0.4`.
    pub version: String,
    /// e.g. `https://10.213.64.11:8443`.
    pub url: String,
    /// SHA-256 of its certificate (a cluster's members share one), 64 hex digits.
    pub fingerprint: String,
    /// The cluster it is a member of.
    pub cluster: Option<String>,
    certificate: PathBuf,
    pub(crate) socket: PathBuf,
    #[serde(skip)]
    lab: (u16, PathBuf),
}

#[derive(Deserialize)]
struct Description {
    id: u16,
    client: KeyPair,
    servers: Vec<Server>,
    vms: Option<Vms>,
}

#[derive(Deserialize)]
struct KeyPair {
    cert: PathBuf,
    key: PathBuf,
}

fn script() -> PathBuf {
    shared::root().join("tests/lab/lab.sh")
}

/// What the script says is missing.
fn said_missing(check: &str, kind: Kind) -> Option<String> {
    let settings = kind.settings().iter().copied();
    match std::process::Command::new(script()).arg(check).envs(settings).output() {
        Ok(out) if out.status.success() => None,
        Ok(out) => Some(String::from_utf8_lossy(&out.stdout).trim().to_owned()),
        Err(error) => Some(format!("tests/lab/lab.sh cannot be run: {error}")),
    }
}

fn lab_env(id: u16, dir: &Path) -> [(&'static str, String); 2] {
    [("LAB_ID", id.to_string()), ("LAB_DIR", dir.display().to_string())]
}

impl Kind {
    /// Settings of lab.sh.
    fn settings(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Kind::Containers => &[],
            Kind::Vms => &[("LAB_VMS", "1"), ("LAB_CLUSTER", "m1 m2"), ("LAB_INCUS7", "")],
            Kind::Criu => &[
                ("LAB_CRIU", "1"),
                ("LAB_CLUSTER", ""),
                ("LAB_LXD", ""),
                ("LAB_INCUS7", "t1 t2 t3"),
                ("LAB_SHIFTED", "t3"),
            ],
        }
    }

    /// Where a run says that its servers are.
    fn variable(self) -> &'static str {
        match self {
            Kind::Containers => "BERTH_LAB_DIR",
            Kind::Vms => "BERTH_VM_LAB_DIR",
            Kind::Criu => "BERTH_CRIU_LAB_DIR",
        }
    }
}

impl Lab {
    pub(crate) fn what_is_missing(kind: Kind) -> Option<String> {
        said_missing("check", kind)
    }

    /// Why there are no servers t1 and t2, if there are none.
    pub(crate) fn what_is_missing_for_incus7() -> Option<String> {
        let missing = said_missing("check-incus7", Kind::Containers);
        let Some(dir) = std::env::var_os("BERTH_LAB_DIR") else {
            return missing;
        };
        let text = std::fs::read(PathBuf::from(dir).join("lab.json")).unwrap_or_default();
        let lab: Option<Description> = serde_json::from_slice(&text).ok();
        let has_it = lab.is_some_and(|lab| lab.servers.iter().any(|server| server.name == "t1"));
        (!has_it).then(|| missing.unwrap_or_else(|| "this lab was started without".to_owned()))
    }

    /// The servers of this run: those that the environment names, or some that end with this process.
    pub(crate) async fn shared(kind: Kind) -> &'static Lab {
        let cell = match kind {
            Kind::Containers => &SHARED,
            Kind::Vms => &SHARED_VMS,
            Kind::Criu => &SHARED_CRIU,
        };
        cell.get_or_init(|| Lab::start(kind)).await
    }

    async fn start(kind: Kind) -> Lab {
        let dir = match std::env::var_os(kind.variable()) {
            Some(dir) => PathBuf::from(dir),
            None => Lab::start_own(kind).await,
        };
        let path = dir.join("lab.json");
        let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let lab: Description =
            serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut servers = lab.servers;
        for server in &mut servers {
            server.lab = (lab.id, dir.clone());
        }
        let vms = match lab.vms {
            Some(vms) => Some((vms.clone(), Ticks::listen(&vms).await)),
            None => None,
        };
        Lab {
            vms,
            dir,
            id: lab.id,
            client_cert: lab.client.cert,
            client_key: lab.client.key,
            servers,
        }
    }

    async fn start_own(kind: Kind) -> PathBuf {
        let (id, lock) = shared::take_number("berth-lab", 100, 250)
            .unwrap_or_else(|error| panic!("no number for a lab of our own: {error}"));
        let dir = PathBuf::from(format!("/var/lib/berth-lab-{id}"));
        let env = lab_env(id, &dir);
        shared::end_with_this_process(&script(), &env, Some(&lock))
            .unwrap_or_else(|error| panic!("cannot provide for the lab's end: {error}"));
        for step in ["down", "up"] {
            let mut command = Command::new(script());
            command
                .arg(step)
                .envs(env.clone())
                .envs(kind.settings().iter().copied());
            shared::run(command)
                .await
                .unwrap_or_else(|error| panic!("the lab does not start: {error}"));
        }
        dir
    }

    pub(crate) fn vms(&self) -> &Vms {
        &self.vms.as_ref().expect("the suite names Needs::Vms").0
    }

    pub(crate) fn ticks(&self) -> &Ticks {
        &self.vms.as_ref().expect("the suite names Needs::Vms").1
    }

    /// The server of this name: i1, i2 (Incus 6), t1, t2 (Incus 7, if there is a root for them), l1, l2 (LXD), m1, m2, m3 (an Incus cluster).
    pub fn server(&self, name: &str) -> &Server {
        self.servers
            .iter()
            .find(|server| server.name == name)
            .unwrap_or_else(|| panic!("the lab has no server {name}"))
    }

    /// All of them.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// PEM of the client certificate that every server trusts.
    pub fn client_cert(&self) -> String {
        read(&self.client_cert)
    }

    /// PEM of its key.
    pub fn client_key(&self) -> String {
        read(&self.client_key)
    }

    /// `incus ARGS` on this machine, each Incus server being a remote: `["move", "i1:c", "i2:c"]`.
    pub async fn incus(&self, args: &[&str]) -> Result<String, String> {
        run_client(Product::Incus, &self.dir, args).await
    }

    /// `lxc ARGS` on this machine, each LXD server being a remote.
    pub async fn lxc(&self, args: &[&str]) -> Result<String, String> {
        run_client(Product::Lxd, &self.dir, args).await
    }

    /// Pastes a command, such as the fix of a refusal, into a shell that knows the servers as remotes.
    pub async fn paste(&self, command: &str) {
        shell(command, self.client_settings()).await;
    }

    /// Environment in which `incus` and `lxc` know every server as a remote.
    pub fn client_settings(&self) -> [(&'static str, PathBuf); 2] {
        let conf = |tool: &str| self.dir.join("cli").join(tool);
        [("INCUS_CONF", conf("incus")), ("LXD_CONF", conf("lxc"))]
    }

    /// Where instances of this name are: server and status, e.g. `[("i1", "Running")]`. Clusters count once, by their first member.
    pub async fn whereabouts(&self, name: &str) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for server in self.entrances() {
            for instance in server.instances().await.unwrap_or_default() {
                if instance["name"] == name {
                    let status = instance["status"].as_str().unwrap_or_default().to_owned();
                    found.push((server.name.clone(), status));
                }
            }
        }
        found
    }

    /// The URLs of a server: its own and those of the other members of its cluster.
    pub(crate) fn addresses(&self, server: &Server) -> Vec<&str> {
        let mate =
            |other: &&Server| other.name == server.name || other.cluster.is_some() && other.cluster == server.cluster;
        let mut mates: Vec<&Server> = self.servers.iter().filter(mate).collect();
        mates.sort_by_key(|other| other.name != server.name);
        mates.into_iter().map(|other| other.url.as_str()).collect()
    }

    /// One server per cluster, and all others.
    pub fn entrances(&self) -> impl Iterator<Item = &Server> {
        let first = |server: &&Server| {
            let same = |other: &Server| other.cluster == server.cluster;
            server.cluster.is_none()
                || self.servers.iter().find(|other| same(other)).map(|s| &s.name) == Some(&server.name)
        };
        self.servers.iter().filter(first)
    }

    pub(crate) async fn delete_instances_of(&self, id: &str) {
        let work = self.entrances().map(|server| server.delete_instances_of(id));
        futures::future::join_all(work).await;
    }

    /// Copies what the daemons wrote into a folder, for whoever looks at a test that failed.
    pub(crate) fn copy_logs(&self, to: &Path) {
        for server in &self.servers {
            for kind in ["log", "out", "ended.out"] {
                let log = format!("{}.{kind}", server.name);
                // a server that never ran wrote nothing, and few end by themselves
                let _ = std::fs::copy(self.dir.join(&log), to.join(&log));
            }
        }
    }

    /// A line for each daemon that ended by itself so far; forgets them.
    pub fn take_ends(&self) -> String {
        let path = self.dir.join("ends");
        let ends = std::fs::read_to_string(&path).unwrap_or_default();
        let _ = std::fs::remove_file(&path);
        ends
    }

    /// This machine's address in the servers' network.
    pub fn address(&self) -> String {
        format!("10.213.{}.1", self.id)
    }

    /// An address for a container with the profile `lan`, in a network that reaches all servers and this machine.
    pub fn guest_address(&self, number: u8) -> String {
        format!("10.215.{}.{number}", self.id)
    }
}

/// Pastes a command into a shell.
async fn shell(command: &str, settings: [(&'static str, PathBuf); 2]) {
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).envs(settings);
    shared::run(shell).await.unwrap_or_else(|error| panic!("{error}"));
}

async fn run_client(product: Product, lab: &Path, args: &[&str]) -> Result<String, String> {
    let (tool, conf) = match product {
        Product::Incus => ("incus", "INCUS_CONF"),
        Product::Lxd => ("lxc", "LXD_CONF"),
    };
    let mut command = Command::new(tool);
    command.args(args).env(conf, lab.join("cli").join(tool));
    shared::run(command).await
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

impl Server {
    /// PEM of its certificate.
    pub fn certificate(&self) -> String {
        read(&self.certificate)
    }

    /// Its certificate and key, for the proxy.
    pub(crate) fn key_pair(&self) -> (PathBuf, PathBuf) {
        let dir = self.lab.1.join(&self.name);
        let kind = if self.cluster.is_some() { "cluster" } else { "server" };
        (dir.join(format!("{kind}.crt")), dir.join(format!("{kind}.key")))
    }

    /// Runs the client for its product on this machine.
    pub(crate) async fn client(&self, args: &[&str]) -> Result<String, String> {
        run_client(self.product, &self.lab.1, args).await
    }

    /// Pastes a command into a shell of its host, whose own daemon it is.
    pub async fn paste_on_host(&self, command: &str) {
        let data = self.lab.1.join(&self.name);
        shell(command, [("INCUS_SOCKET", data.join("unix.socket")), ("LXD_DIR", data)]).await;
    }

    //---------------------------------------------------------------- faults

    pub(crate) async fn control(&self, args: &[&str]) -> String {
        let mut command = Command::new(script());
        command.args(args).envs(lab_env(self.lab.0, &self.lab.1));
        shared::run(command)
            .await
            .unwrap_or_else(|error| panic!("lab.sh {args:?}: {error}"))
    }

    /// Where the CRIU of a server is that has one of its own (see [`crate::Needs::Criu`]).
    pub fn criu(&self) -> PathBuf {
        self.lab.1.join(format!("{}.criu/criu", self.name))
    }

    /// Process id of its daemon.
    pub async fn daemon_pid(&self) -> u32 {
        let pid = self.control(&["daemon-pid", &self.name]).await;
        pid.trim()
            .parse()
            .unwrap_or_else(|error| panic!("daemon-pid said {pid:?}: {error}"))
    }

    /// Kills the daemon (SIGKILL); its containers live on.
    pub async fn kill_daemon(&self) {
        self.control(&["daemon-kill", &self.name]).await;
    }

    /// Sends the daemon a signal, e.g. `STOP`, `CONT`.
    pub async fn signal_daemon(&self, signal: &str) {
        self.control(&["daemon-kill", &self.name, signal]).await;
    }

    /// Starts the daemon again; returns when it answers.
    pub async fn start_daemon(&self) {
        self.control(&["daemon-start", &self.name]).await;
    }

    /// Power loss: daemon and containers are gone at once.
    pub async fn kill_host(&self) {
        self.control(&["host-kill", &self.name]).await;
    }

    /// Boots the host again; returns when the daemon answers.
    pub async fn start_host(&self) {
        self.control(&["host-start", &self.name]).await;
    }

    /// Pulls its network cable.
    pub async fn unplug(&self) {
        self.control(&["net-down", &self.name]).await;
    }

    /// Plugs it in again.
    pub async fn plug(&self) {
        self.control(&["net-up", &self.name]).await;
    }

    /// Limits what leaves it, e.g. `20mbit`; `off` ends that.
    pub async fn throttle(&self, rate: &str) {
        self.control(&["throttle", &self.name, rate]).await;
    }

    /// Bytes that it has sent over its cable so far.
    pub fn sent(&self) -> u64 {
        let path = format!("/sys/class/net/bl{}-{}/statistics/rx_bytes", self.lab.0, self.name);
        let text = read(Path::new(&path));
        text.trim().parse().unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    //---------------------------------------------------------------- requests

    /// GET over the unix socket; the answer's `metadata`.
    pub async fn get(&self, path: &str) -> Result<Value, ApiError> {
        rest::call(&self.socket, Method::GET, path, None).await
    }

    /// Any request; operations are waited for and their failures are errors.
    pub async fn call(&self, method: &str, path: &str, body: Value) -> Result<Value, ApiError> {
        let method = method.parse().unwrap_or_else(|error| panic!("{method}: {error}"));
        rest::call(&self.socket, method, path, Some(&body)).await
    }

    pub(crate) async fn must(&self, method: &str, path: &str, body: Value) -> Value {
        let done = self.call(method, path, body).await;
        done.unwrap_or_else(|error| panic!("{}: {method} {path}: {error}", self.name))
    }
}
