//! The Incus and LXD servers of a test run: faults, and instances as a person would make and see them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::rest::{self, ApiError};
use crate::{shared, wait_for};

static SHARED: OnceCell<Lab> = OnceCell::const_new();

/// All servers of a run.
pub struct Lab {
    dir: PathBuf,
    id: u16,
    client_cert: PathBuf,
    client_key: PathBuf,
    servers: Vec<Server>,
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
    socket: PathBuf,
    #[serde(skip)]
    lab: (u16, PathBuf),
}

#[derive(Deserialize)]
struct Description {
    id: u16,
    client: KeyPair,
    servers: Vec<Server>,
}

#[derive(Deserialize)]
struct KeyPair {
    cert: PathBuf,
    key: PathBuf,
}

/// An instance to create: a busybox container that counts. Start from `NewInstance::default()`.
#[derive(Clone, Debug)]
pub struct NewInstance {
    /// Storage pool: `default` (dir) or `btr` (btrfs, not in clusters).
    pub pool: String,
    /// Project, `default`.
    pub project: String,
    /// Profiles, `["default"]`.
    pub profiles: Vec<String>,
    /// Config keys.
    pub config: Vec<(String, String)>,
    /// Devices beside the root disk, as the server's API takes them.
    pub devices: Value,
    /// How many snapshots (s0, s1, ...) to make, with a file `/root/snap` that differs in each.
    pub snapshots: usize,
    /// Megabytes of random data in `/root/data`.
    pub megabytes: usize,
    /// Start it (default).
    pub start: bool,
    /// Member of the cluster to create it on.
    pub member: Option<String>,
    /// `true`: a graceful stop has no effect.
    pub ignore_stop: bool,
}

impl Default for NewInstance {
    fn default() -> Self {
        NewInstance {
            pool: "default".to_owned(),
            project: "default".to_owned(),
            profiles: vec!["default".to_owned()],
            config: Vec::new(),
            devices: json!({}),
            snapshots: 0,
            megabytes: 0,
            start: true,
            member: None,
            ignore_stop: false,
        }
    }
}

impl NewInstance {
    /// A running container on the given pool.
    pub fn on_pool(pool: &str) -> NewInstance {
        NewInstance {
            pool: pool.to_owned(),
            ..NewInstance::default()
        }
    }
}

fn script() -> PathBuf {
    shared::root().join("tests/lab/lab.sh")
}

fn lab_env(id: u16, dir: &Path) -> [(&'static str, String); 2] {
    [("LAB_ID", id.to_string()), ("LAB_DIR", dir.display().to_string())]
}

impl Lab {
    pub(crate) fn what_is_missing() -> Option<String> {
        match std::process::Command::new(script()).arg("check").output() {
            Ok(out) if out.status.success() => None,
            Ok(out) => Some(String::from_utf8_lossy(&out.stdout).trim().to_owned()),
            Err(error) => Some(format!("tests/lab/lab.sh cannot be run: {error}")),
        }
    }

    /// The servers of this run: those in `BERTH_LAB_DIR`, or some that end with this process.
    pub async fn shared() -> &'static Lab {
        SHARED.get_or_init(Lab::start).await
    }

    async fn start() -> Lab {
        let dir = match std::env::var_os("BERTH_LAB_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => Lab::start_own().await,
        };
        let path = dir.join("lab.json");
        let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let lab: Description =
            serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut servers = lab.servers;
        for server in &mut servers {
            server.lab = (lab.id, dir.clone());
        }
        Lab {
            dir,
            id: lab.id,
            client_cert: lab.client.cert,
            client_key: lab.client.key,
            servers,
        }
    }

    async fn start_own() -> PathBuf {
        let (id, lock) = shared::take_number("berth-lab", 100, 250)
            .unwrap_or_else(|error| panic!("no number for a lab of our own: {error}"));
        let dir = PathBuf::from(format!("/var/lib/berth-lab-{id}"));
        let env = lab_env(id, &dir);
        shared::end_with_this_process(&script(), &env, Some(&lock))
            .unwrap_or_else(|error| panic!("cannot provide for the lab's end: {error}"));
        for step in ["down", "up"] {
            let mut command = Command::new(script());
            command.arg(step).envs(env.clone());
            shared::run(command)
                .await
                .unwrap_or_else(|error| panic!("the lab does not start: {error}"));
        }
        dir
    }

    /// The server of this name: i1, i2 (Incus), l1, l2 (LXD), m1, m2, m3 (an Incus cluster).
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
        self.tool("incus", args).await
    }

    /// `lxc ARGS` on this machine, each LXD server being a remote.
    pub async fn lxc(&self, args: &[&str]) -> Result<String, String> {
        self.tool("lxc", args).await
    }

    async fn tool(&self, tool: &str, args: &[&str]) -> Result<String, String> {
        let conf = self.dir.join("cli").join(tool);
        let mut command = Command::new(tool);
        command
            .args(args)
            .env(if tool == "lxc" { "LXD_CONF" } else { "INCUS_CONF" }, conf);
        shared::run(command).await
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

    /// This machine's address in the servers' network.
    pub fn address(&self) -> String {
        format!("10.213.{}.1", self.id)
    }
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

    //---------------------------------------------------------------- faults

    async fn control(&self, args: &[&str]) -> String {
        let mut command = Command::new(script());
        command.args(args).envs(lab_env(self.lab.0, &self.lab.1));
        shared::run(command)
            .await
            .unwrap_or_else(|error| panic!("lab.sh {args:?}: {error}"))
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

    async fn must(&self, method: &str, path: &str, body: Value) -> Value {
        let done = self.call(method, path, body).await;
        done.unwrap_or_else(|error| panic!("{}: {method} {path}: {error}", self.name))
    }

    //---------------------------------------------------------------- instances

    /// Creates an instance of the given name and, unless told otherwise, starts it and waits until it counts.
    pub async fn create(&self, name: &str, new: &NewInstance) {
        let mut devices = new.devices.clone();
        devices["root"] = json!({"type": "disk", "path": "/", "pool": new.pool});
        let config: serde_json::Map<_, _> = new.config.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        let mut path = format!("/1.0/instances?project={}", new.project);
        if let Some(member) = &new.member {
            path.push_str(&format!("&target={member}"));
        }
        let body = json!({
            "name": name, "type": "container", "profiles": new.profiles, "config": config, "devices": devices,
            "source": {"type": "image", "alias": "bb", "project": "default"},
        });
        self.must("POST", &path, body).await;
        if new.ignore_stop {
            self.write_file_in(name, &new.project, "/etc/ignore-stop", "").await;
        }
        if new.megabytes > 0 {
            let data = random_bytes(new.megabytes);
            self.put_file(name, &new.project, "/root/data", data).await;
        }
        for number in 0..new.snapshots {
            self.write_file_in(name, &new.project, "/root/snap", &number.to_string())
                .await;
            let path = format!("/1.0/instances/{name}/snapshots?project={}", new.project);
            self.must("POST", &path, json!({"name": format!("s{number}")})).await;
        }
        if new.start {
            self.set_state_in(name, &new.project, "start").await;
            self.wait_counting_in(name, &new.project).await;
        }
    }

    /// All instances of all projects.
    pub async fn instances(&self) -> Result<Vec<Value>, ApiError> {
        let mut all = Vec::new();
        for project in self
            .get("/1.0/projects?recursion=1")
            .await?
            .as_array()
            .into_iter()
            .flatten()
        {
            let project = project["name"].as_str().unwrap_or_default();
            let list = self
                .get(&format!("/1.0/instances?recursion=1&project={project}"))
                .await?;
            all.extend(list.as_array().cloned().unwrap_or_default());
        }
        Ok(all)
    }

    /// The instance as the API shows it, or nothing.
    pub async fn instance(&self, name: &str) -> Option<Value> {
        self.instance_in(name, "default").await
    }

    /// As [`Server::instance`], in a project.
    pub async fn instance_in(&self, name: &str, project: &str) -> Option<Value> {
        match self.get(&format!("/1.0/instances/{name}?project={project}")).await {
            Ok(instance) => Some(instance),
            Err(error) if error.code == 404 => None,
            Err(error) => panic!("{}: instance {name}: {error}", self.name),
        }
    }

    /// `Running`, `Stopped`, ..., or `absent`.
    pub async fn status(&self, name: &str) -> String {
        let instance = self.instance(name).await;
        instance
            .and_then(|i| i["status"].as_str().map(str::to_owned))
            .unwrap_or_else(|| "absent".to_owned())
    }

    /// `start`, `stop`, `restart`, `freeze`, `unfreeze`; forced where that means something.
    pub async fn set_state(&self, name: &str, action: &str) {
        self.set_state_in(name, "default", action).await;
    }

    async fn set_state_in(&self, name: &str, project: &str, action: &str) {
        self.try_state_in(name, project, action)
            .await
            .unwrap_or_else(|error| panic!("{}: {action} {name}: {error}", self.name));
    }

    /// As [`Server::set_state`] where a refusal is of interest.
    pub async fn try_state(&self, name: &str, action: &str) -> Result<Value, ApiError> {
        self.try_state_in(name, "default", action).await
    }

    async fn try_state_in(&self, name: &str, project: &str, action: &str) -> Result<Value, ApiError> {
        let path = format!("/1.0/instances/{name}/state?project={project}");
        let force = matches!(action, "stop" | "restart");
        self.call("PUT", &path, json!({"action": action, "timeout": 30, "force": force}))
            .await
    }

    /// Renames a stopped instance.
    pub async fn rename(&self, name: &str, new: &str) {
        self.must("POST", &format!("/1.0/instances/{name}"), json!({"name": new}))
            .await;
    }

    /// Merges into an instance, e.g. `{"config": {"limits.memory": "64MiB"}}`.
    pub async fn patch(&self, name: &str, body: Value) {
        self.must("PATCH", &format!("/1.0/instances/{name}"), body).await;
    }

    /// Stops and deletes it, whatever protects it.
    pub async fn delete(&self, name: &str) -> Result<(), ApiError> {
        self.delete_in(name, "default").await
    }

    async fn delete_in(&self, name: &str, project: &str) -> Result<(), ApiError> {
        let path = format!("/1.0/instances/{name}?project={project}");
        // refused if it does not run
        let _ = self.try_state_in(name, project, "stop").await;
        match self.call("DELETE", &path, Value::Null).await {
            Err(error) if error.message.contains("protected") => {
                self.call("PATCH", &path, json!({"config": {"security.protection.delete": ""}}))
                    .await?;
                self.call("DELETE", &path, Value::Null).await.map(drop)
            }
            other => other.map(drop),
        }
    }

    async fn delete_instances_of(&self, id: &str) {
        let instances = self.instances().await.unwrap_or_default();
        for instance in instances {
            let text = |key: &str| instance[key].as_str().unwrap_or_default().to_owned();
            if text("name").contains(id)
                && let Err(error) = self.delete_in(&text("name"), &text("project")).await
            {
                eprintln!("left behind on {}: {}: {error}", self.name, text("name"));
            }
        }
    }

    //---------------------------------------------------------------- inside instances

    /// Runs a command in an instance; its output.
    pub async fn exec(&self, name: &str, command: &[&str]) -> Result<String, String> {
        let (tool, conf) = match self.product {
            Product::Incus => ("incus", "INCUS_CONF"),
            Product::Lxd => ("lxc", "LXD_CONF"),
        };
        let mut process = Command::new(tool);
        process
            .args(["exec", &format!("{}:{name}", self.name), "--"])
            .args(command);
        process.env(conf, self.lab.1.join("cli").join(tool));
        shared::run(process).await
    }

    /// A file of an instance, running or not.
    pub async fn read_file(&self, name: &str, path: &str) -> Option<Vec<u8>> {
        self.read_file_in(name, "default", path).await
    }

    async fn read_file_in(&self, name: &str, project: &str, path: &str) -> Option<Vec<u8>> {
        let uri = format!("/1.0/instances/{name}/files?project={project}&path={path}");
        match rest::raw(&self.socket, Method::GET, &uri, &[], Vec::new()).await {
            Ok((200, bytes)) => Some(bytes.to_vec()),
            _ => None,
        }
    }

    /// Writes a small file.
    pub async fn write_file(&self, name: &str, path: &str, text: &str) {
        self.write_file_in(name, "default", path, text).await;
    }

    async fn write_file_in(&self, name: &str, project: &str, path: &str, text: &str) {
        self.put_file(name, project, path, text.as_bytes().to_vec()).await;
    }

    async fn put_file(&self, name: &str, project: &str, path: &str, data: Vec<u8>) {
        let uri = format!("/1.0/instances/{name}/files?project={project}&path={path}");
        let prefix = match self.product {
            Product::Incus => "X-Incus",
            Product::Lxd => "X-LXD",
        };
        let keys = [("type", "file"), ("mode", "0644"), ("uid", "0"), ("gid", "0")];
        let headers = keys.map(|(key, value)| (format!("{prefix}-{key}"), value));
        let headers = headers.each_ref().map(|(key, value)| (key.as_str(), *value));
        let done = rest::raw(&self.socket, Method::POST, &uri, &headers, data).await;
        match done {
            Ok((200, _)) => {}
            Ok((status, body)) => panic!("{name}: write {path}: {status} {}", String::from_utf8_lossy(&body)),
            Err(error) => panic!("{name}: write {path}: {error}"),
        }
    }

    /// How far it has counted since it was created.
    pub async fn counter(&self, name: &str) -> u64 {
        self.counter_in(name, "default").await
    }

    async fn counter_in(&self, name: &str, project: &str) -> u64 {
        let file = self
            .read_file_in(name, project, "/var/lib/counter")
            .await
            .unwrap_or_default();
        String::from_utf8_lossy(&file).trim().parse().unwrap_or(0)
    }

    /// Waits until it counts further than now.
    pub async fn wait_counting(&self, name: &str) {
        self.wait_counting_in(name, "default").await;
    }

    async fn wait_counting_in(&self, name: &str, project: &str) {
        let what = format!("{name} to run on {}", self.name);
        // reading a file of a stopped instance can make the start that is just under way fail
        wait_for(&what, Duration::from_secs(20), || async {
            let instance = self.instance_in(name, project).await;
            let status = instance.map_or(Value::Null, |instance| instance["status"].clone());
            if status == "Running" {
                Ok(())
            } else {
                Err(format!("status {status}"))
            }
        })
        .await;
        let before = self.counter_in(name, project).await;
        wait_for(
            &format!("{name} to count on {}", self.name),
            Duration::from_secs(15),
            || async {
                let now = self.counter_in(name, project).await;
                if now > before {
                    Ok(())
                } else {
                    Err(format!("counter {now}"))
                }
            },
        )
        .await;
    }

    /// How often it has booted (lines of its own log).
    pub async fn boots(&self, name: &str) -> usize {
        let log = self.read_file(name, "/var/log/init.log").await.unwrap_or_default();
        String::from_utf8_lossy(&log)
            .lines()
            .filter(|line| line.starts_with("boot"))
            .count()
    }

    /// SHA-256 of a file of an instance.
    pub async fn checksum(&self, name: &str, path: &str) -> Option<String> {
        use sha2::Digest;
        let file = self.read_file(name, path).await?;
        Some(
            sha2::Sha256::digest(&file)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        )
    }
}

/// Data that does not compress and differs each time.
fn random_bytes(megabytes: usize) -> Vec<u8> {
    use std::io::Read;
    let mut bytes = Vec::with_capacity(megabytes << 20);
    let read = std::fs::File::open("/dev/urandom")
        .and_then(|file| file.take((megabytes as u64) << 20).read_to_end(&mut bytes));
    read.unwrap_or_else(|error| panic!("/dev/urandom: {error}"));
    bytes
}
