//! Virtual machines of the lab: made from nothing but a kernel and a counter, and judged from outside by the ticks that
//! they broadcast, since nobody can ask inside them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::UdpSocket;

use crate::{Lab, Product, Server, wait_for};

/// What the lab's guests are made of.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Vms {
    kernel: String,
    initrd: String,
    /// First three numbers of the guests' network.
    network: String,
}

/// Port to which guests broadcast.
const PORT: u16 = 9999;
static ADDRESS: AtomicU8 = AtomicU8::new(20);

/// A virtual machine to create; start from `NewVm::default()`.
#[derive(Clone, Debug)]
pub struct NewVm {
    /// Storage pool.
    pub pool: String,
    /// Config keys, over those that every guest here has.
    pub config: Vec<(String, String)>,
    /// Devices beside the root disk; with `null` the guest gets a card in the network `lan0`.
    pub devices: Value,
    /// Keys of the root disk, e.g. `{"size.state": "64MiB"}`.
    pub root: Value,
    /// `migration.stateful`.
    pub stateful: bool,
    /// More words for QEMU.
    pub qemu: String,
    /// How many snapshots (s0, s1, ...) to make.
    pub snapshots: usize,
    /// Start it and wait until it ticks (default).
    pub start: bool,
    /// Member of the cluster to create it on.
    pub member: Option<String>,
}

impl Default for NewVm {
    fn default() -> Self {
        NewVm {
            pool: "default".to_owned(),
            config: Vec::new(),
            devices: Value::Null,
            root: json!({}),
            stateful: true,
            qemu: String::new(),
            snapshots: 0,
            start: true,
            member: None,
        }
    }
}

/// What was heard of a guest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Heard {
    /// Its boot ids: one, unless it was started anew.
    pub boots: BTreeSet<String>,
    /// Its addresses.
    pub addresses: BTreeSet<String>,
    /// First and last number heard.
    pub range: (u64, u64),
    /// Numbers between them that nobody heard.
    pub missing: Vec<u64>,
    /// Numbers that were heard twice: two guests ran.
    pub repeated: Vec<u64>,
    /// The longest time in which no new number was heard.
    pub silence: Duration,
}

#[derive(Clone, Debug)]
struct Tick {
    at: Instant,
    address: String,
    number: u64,
    boot: String,
}

/// Everything that was heard, by guest.
#[derive(Clone, Default)]
pub(crate) struct Ticks(Arc<Mutex<BTreeMap<String, Vec<Tick>>>>);

impl Ticks {
    /// Listens to all guests of a network, as long as the process lives.
    pub async fn listen(vms: &Vms) -> Ticks {
        let ticks = Ticks::default();
        // bound to the broadcast address it hears this lab only
        let socket = UdpSocket::bind((format!("{}.255", vms.network), PORT)).await;
        let socket = socket.unwrap_or_else(|error| panic!("cannot listen to the guests: {error}"));
        let heard = ticks.clone();
        tokio::spawn(async move {
            let mut line = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut line).await {
                heard.note(&String::from_utf8_lossy(&line[..length]), &from.ip().to_string());
            }
        });
        ticks
    }

    fn note(&self, line: &str, address: &str) {
        let mut words = line.split_whitespace();
        let (Some("TICK"), Some(name), Some(number), Some(boot)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return;
        };
        let Ok(number) = number.parse() else { return };
        let tick = Tick {
            at: Instant::now(),
            address: address.to_owned(),
            number,
            boot: boot.to_owned(),
        };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(name.to_owned()).or_default().push(tick);
    }

    fn of(&self, name: &str, since: Instant) -> Vec<Tick> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ticks = all.get(name).into_iter().flatten();
        ticks.filter(|t| t.at >= since).cloned().collect()
    }
}

impl Lab {
    /// What was heard since then of the guest that was created under that name.
    pub fn heard(&self, name: &str, since: Instant) -> Heard {
        let ticks = self.ticks().of(name, since);
        let mut heard = Heard::default();
        let mut seen = BTreeSet::new();
        let mut last = since;
        for tick in &ticks {
            heard.boots.insert(tick.boot.clone());
            heard.addresses.insert(tick.address.clone());
            if !seen.insert((tick.boot.clone(), tick.number)) {
                heard.repeated.push(tick.number);
                continue;
            }
            heard.silence = heard.silence.max(tick.at - last);
            last = tick.at;
        }
        let numbers: BTreeSet<u64> = seen.into_iter().map(|(_, number)| number).collect();
        if let (Some(first), Some(last)) = (numbers.first().copied(), numbers.last().copied()) {
            heard.range = (first, last);
            heard.missing = (first..=last).filter(|n| !numbers.contains(n)).collect();
        }
        heard
    }

    /// The numbers that were heard of one boot of the guest.
    pub fn numbers(&self, name: &str, boot: &str) -> BTreeSet<u64> {
        let all = self.ticks().0.lock().unwrap_or_else(PoisonError::into_inner);
        let ticks = all.get(name).into_iter().flatten();
        ticks.filter(|t| t.boot == boot).map(|t| t.number).collect()
    }

    /// Waits until the guest is heard after now; its boot id.
    pub async fn wait_ticking(&self, name: &str) -> String {
        let since = Instant::now();
        wait_for(
            &format!("the guest {name} to tick"),
            Duration::from_secs(120),
            || async {
                let ticks = self.ticks().of(name, since);
                // one of them may have been on its way when the guest was stopped
                let last = ticks.get(2..).and_then(|t| t.last());
                last.map(|t| t.boot.clone())
                    .ok_or_else(|| format!("{} ticks", ticks.len()))
            },
        )
        .await
    }

    /// Creates a virtual machine on a server and, unless told otherwise, starts it and waits until it ticks.
    pub async fn create_vm(&self, server: &Server, name: &str, new: &NewVm) {
        let mut root = json!({"type": "disk", "path": "/", "pool": new.pool, "size": "8MiB", "size.state": "256MiB"});
        merge(&mut root, &new.root);
        let card = json!({"eth0": {"type": "nic", "nictype": "bridged", "parent": "lan0", "name": "eth0"}});
        let mut devices = if new.devices.is_null() {
            card
        } else {
            new.devices.clone()
        };
        devices["root"] = root;
        let mut path = "/1.0/instances".to_owned();
        if let Some(member) = &new.member {
            path.push_str(&format!("?target={member}"));
        }
        let body = json!({
            "name": name, "type": "virtual-machine", "architecture": "x86_64", "profiles": ["default"],
            "config": self.guest_config(server, name, new), "devices": devices, "source": {"type": "none"},
        });
        server.must("POST", &path, body).await;
        let node = new.member.as_deref().map_or(server, |member| self.server(member));
        node.fill_disk(name, &new.pool).await;
        for number in 0..new.snapshots {
            let path = format!("/1.0/instances/{name}/snapshots");
            server.must("POST", &path, json!({"name": format!("s{number}")})).await;
        }
        if new.start {
            server.set_state(name, "start").await;
            self.wait_ticking(name).await;
        }
    }

    fn guest_config(&self, server: &Server, name: &str, new: &NewVm) -> Value {
        let vms = self.vms();
        let number = ADDRESS.fetch_add(1, Ordering::Relaxed) % 200 + 20;
        let network = &vms.network;
        let words =
            format!("console=ttyS0 quiet panic=-1 lab.ip={network}.{number}/24 lab.to={network}.255 lab.name={name}");
        let qemu = format!(
            "-cpu max -kernel {} -initrd {} -append '{words}' {}",
            vms.kernel, vms.initrd, new.qemu
        );
        let mut config = json!({"limits.cpu": "1", "limits.memory": "128MiB", "raw.qemu": qemu});
        if new.stateful {
            config["migration.stateful"] = json!("true");
        }
        if server.product == Product::Incus {
            config["raw.qemu.conf"] = json!("[machine]\naccel = \"tcg\"");
        }
        for (key, value) in &new.config {
            config[key] = json!(value);
        }
        config
    }
}

impl Server {
    fn root_image(&self, name: &str, pool: &str) -> String {
        let product = match self.product {
            Product::Incus => "incus",
            Product::Lxd => "lxd",
        };
        format!("/var/lib/{product}/storage-pools/{pool}/virtual-machines/{name}/root.img")
    }

    /// The numbers that one boot of a guest wrote to its disk, which is `/dev/vda` if its root has `io.bus: virtio-blk`.
    pub async fn numbers_on_disk(&self, name: &str, pool: &str, boot: &str) -> BTreeSet<u64> {
        let image = self.root_image(name, pool);
        let find = format!("LC_ALL=C grep -a -o 'TICK {name} [0-9]* {boot}' {image}");
        let found = self.control(&["exec", &self.name, "sh", "-c", &find]).await;
        let number = |line: &str| line.split(' ').nth(2)?.parse().ok();
        found.lines().filter_map(number).collect()
    }

    /// A small file on the server itself.
    pub async fn write_on_host(&self, path: &str) {
        self.control(&["exec", &self.name, "sh", "-c", &format!("echo lab >{path}")])
            .await;
    }

    /// Other data on the root disk of a virtual machine; one that is all zero would be cut to one byte by a move on dir pools.
    pub async fn fill_disk(&self, name: &str, pool: &str) {
        let image = self.root_image(name, pool);
        let fill = format!("dd if=/dev/urandom of={image} bs=1M count=8 conv=notrunc,fsync 2>/dev/null");
        self.control(&["exec", &self.name, "sh", "-c", &fill]).await;
    }

    /// SHA-256 of the root disk of a virtual machine that does not run, or whose guest does not write.
    pub async fn disk_checksum(&self, name: &str, pool: &str) -> String {
        let image = self.root_image(name, pool);
        let sum = self.control(&["exec", &self.name, "sha256sum", &image]).await;
        sum.split_whitespace().next().unwrap_or_default().to_owned()
    }
}

fn merge(into: &mut Value, from: &Value) {
    for (key, value) in from.as_object().into_iter().flatten() {
        into[key] = value.clone();
    }
}
