//! Instances of the lab's servers, made and looked at as a person would.

use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use crate::rest::{self, ApiError};
use crate::{Product, Server, wait_for, wait_until};

/// The longest that a server takes to see that a container has ended.
const STOPS: Duration = Duration::from_secs(30);
/// A helper for files ends when nobody asked it for 15 s (Incus and LXD, `forkfile`).
const HELPER_ENDS: Duration = Duration::from_secs(17);

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

    /// `raw.lxc` that CRIU needs; the second line is for kernels without AppArmor.
    pub const RAW_LXC: &str = "lxc.console.path = none\nlxc.apparmor.profile =";

    /// A container that CRIU can move, with or without a network card.
    pub fn movable(privileged: bool, card: bool) -> NewInstance {
        let mut config = vec![("migration.stateful", "true"), ("raw.lxc", Self::RAW_LXC)];
        config.extend(privileged.then_some(("security.privileged", "true")));
        let devices = if card {
            json!({})
        } else {
            json!({"eth0": {"type": "none"}})
        };
        NewInstance {
            config: config.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
            devices,
            ..NewInstance::default()
        }
    }
}

impl Server {
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
        let list = self.get("/1.0/instances?recursion=1&all-projects=true").await?;
        Ok(list.as_array().cloned().unwrap_or_default())
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

    /// A server that stops a container by force first forbids it to fork. A shell that is PID 1 may end of that before it is
    /// killed, and the server then says that the container did not run.
    async fn set_state_in(&self, name: &str, project: &str, action: &str) {
        match self.try_state_in(name, project, action).await {
            Err(error) if action == "stop" && error.message.contains("container is not running") => {
                let stopped = || async {
                    let instance = self.instance_in(name, project).await;
                    instance.is_some_and(|i| i["status"] == "Stopped")
                };
                wait_until("a container that ended at its stop to be stopped", STOPS, stopped).await;
            }
            done => drop(done.unwrap_or_else(|error| panic!("{}: {action} {name}: {error}", self.name))),
        }
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

    /// As [`Server::delete`], in a project.
    pub async fn delete_in(&self, name: &str, project: &str) -> Result<(), ApiError> {
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

    /// Stops and deletes the only instance of a project, then the project.
    pub async fn delete_with_project(&self, name: &str, project: &str) {
        let deleted = self.delete_in(name, project).await;
        deleted.unwrap_or_else(|error| panic!("{}: {name} in {project}: {error}", self.name));
        self.must("DELETE", &format!("/1.0/projects/{project}"), Value::Null)
            .await;
    }

    pub(crate) async fn delete_instances_of(&self, id: &str) {
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
        let instance = format!("{}:{name}", self.name);
        self.client(&[&["exec", &instance, "--"], command].concat()).await
    }

    /// A file of an instance, running or not.
    pub async fn read_file(&self, name: &str, path: &str) -> Option<Vec<u8>> {
        self.read_file_in(name, "default", path).await
    }

    async fn read_file_in(&self, name: &str, project: &str, path: &str) -> Option<Vec<u8>> {
        let uri = format!("/1.0/instances/{name}/files?project={project}&path={path}");
        match self.file_request(Method::GET, &uri, &[], Vec::new()).await {
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
        let done = self.file_request(Method::POST, &uri, &headers, data).await;
        match done {
            Ok((200, _)) => {}
            Ok((status, body)) => panic!("{name}: write {path}: {status} {}", String::from_utf8_lossy(&body)),
            Err(error) => panic!("{name}: write {path}: {error}"),
        }
    }

    /// A request about a file. All servers here but the newest have a race: a helper that ends (after 15 s in which nobody
    /// asked) takes the socket of the one that follows it away. The request fails, and so does each that comes while the
    /// follower, whom nobody reaches, is still there: only leaving it alone helps.
    async fn file_request(
        &self,
        method: Method,
        uri: &str,
        headers: &[(&str, &str)],
        data: Vec<u8>,
    ) -> Result<(u16, hyper::body::Bytes), ApiError> {
        let mut left = 3;
        loop {
            let done = rest::raw(&self.socket, method.clone(), uri, headers, data.clone()).await;
            let lost = matches!(&done, Ok((500, body)) if String::from_utf8_lossy(body).contains("forkfile.sock"));
            if !lost || left == 0 {
                return done;
            }
            left -= 1;
            tokio::time::sleep(HELPER_ENDS).await;
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
        wait_for(&what, Duration::from_secs(60), || async {
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
            Duration::from_secs(60),
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
