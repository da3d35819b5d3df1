//! What people, guests and hosts do to the world: make servers and instances, start and stop them, write data, pull plugs.
//! All of it happens at once and asks no hook.

use std::time::Duration;

use berth_core::marks;
use berth_core::model::{
    Change, Config, Devices, InstanceKind, InstanceRef, Member, MemberStatus, Network, Pool, Product, Profile, Project,
};

use crate::config;
use crate::operations::Due;
use crate::options::{InstanceOptions, Options, Timing, pairs};
use crate::state::{Busy, Content, Host, Inst, Snap, State};
use crate::world::World;

impl World {
    /// A new server, or a cluster if the options name members.
    pub fn add_server(&self, name: &str, product: Product, options: Options) {
        self.change(|s| {
            let n = s.servers.len() + 1;
            s.servers.insert(name.to_owned(), new_host(name, n, product, &options));
        });
    }

    /// A new instance, made by a person; returns its uuid. It must be one that its server accepts.
    pub fn add_instance(&self, server: &str, at: &InstanceRef, options: InstanceOptions) -> String {
        self.change(|s| s.add_instance(server, at, options))
    }

    /// A person starts an instance by name.
    pub fn start(&self, server: &str, at: &InstanceRef) -> Result<(), String> {
        self.by_person(server, at, "starts", |s, born| {
            let host = s
                .servers
                .get(server)
                .filter(|h| h.reachable())
                .ok_or("the server does not answer")?;
            let i = host.instances.get(at).ok_or("Instance not found")?;
            if let Some(why) = config::unstartable(host, &at.project, &at.name, i) {
                let btrfs = host.driver(&i.pool) == "btrfs";
                if let Some(i) = s.inst_by_born(server, born).filter(|i| i.busy.is_none()) {
                    crate::writes::touch(i, btrfs);
                }
                return Err(why);
            }
            s.run(server, born, None);
            Ok(())
        })
    }

    /// A person stops an instance by name.
    pub fn stop(&self, server: &str, at: &InstanceRef) -> Result<(), String> {
        self.by_person(server, at, "stops", |s, born| {
            let i = s.inst_by_born(server, born).ok_or("Instance not found")?;
            match &i.busy {
                _ if !i.runs() => Err("The instance is already stopped".to_owned()),
                Some(busy) if busy.action != "stop" => {
                    Err(format!("Instance is busy running a \"{}\" operation", busy.action))
                }
                Some(_) | None => {
                    s.guest_stops(server, born);
                    Ok(())
                }
            }
        })
    }

    /// A person stops a virtual machine and has its running state saved.
    pub fn save(&self, server: &str, at: &InstanceRef) -> Result<(), String> {
        self.by_person(server, at, "saves", |s, born| {
            let running = s.inst_by_born(server, born).is_some_and(|i| i.runs());
            if !running {
                return Err("The instance is already stopped".to_owned());
            }
            if let Some(why) = s.stays(server, born, true) {
                return Err(why);
            }
            s.guest_stops(server, born);
            if let Some(i) = s.inst_by_born(server, born) {
                i.stateful = true;
            }
            Ok(())
        })
    }

    /// A person deletes a stopped instance. It is not missed: the newest data of its identity are not looked for any more
    /// if no other copy has them.
    pub fn delete(&self, server: &str, at: &InstanceRef) -> Result<(), String> {
        self.by_person(server, at, "deletes", |s, born| {
            let i = s.inst_by_born(server, born).ok_or("Instance not found")?.clone();
            if i.runs() || i.busy.is_some() {
                return Err("Instance is running".to_owned());
            }
            if i.config.get(marks::PROTECTION_DELETE).is_some_and(|v| v == "true") {
                return Err("Instance is protected".to_owned());
            }
            s.vanish(server, born, None);
            let left = s.servers.values().flat_map(|h| h.instances.values());
            let left = left
                .filter(|o| o.uuid() == i.uuid() && o.content == Content::Complete)
                .map(|o| o.data)
                .max();
            match left {
                Some(data) => s.newest.insert(i.uuid().to_owned(), data),
                None => s.newest.remove(i.uuid()),
            };
            Ok(())
        })
    }

    /// A person changes an instance.
    pub fn edit(&self, server: &str, at: &InstanceRef, change: &Change) -> Result<(), String> {
        let what = format!("edit {at} on {server}");
        self.by_person(server, at, "edits", |s, _| {
            s.patch(server, at, change, None, &what).map_err(|e| e.message)
        })
    }

    /// A person takes a snapshot.
    pub fn take_snapshot(&self, server: &str, at: &InstanceRef, name: &str) -> Result<(), String> {
        self.by_person(server, at, "takes a snapshot of", |s, _| {
            s.snapshot(server, at, name, None, "take a snapshot")
                .map(|_| ())
                .map_err(|e| e.message)
        })
    }

    /// A person restores a snapshot: configuration and devices come back with it, marks and guard included.
    pub fn restore_snapshot(&self, server: &str, at: &InstanceRef, name: &str) -> Result<(), String> {
        self.by_person(server, at, "restores a snapshot of", |s, born| {
            let i = s.inst_by_born(server, born).ok_or("Instance not found")?;
            let snap = i
                .snapshots
                .iter()
                .find(|s| s.name == name)
                .cloned()
                .ok_or("Snapshot not found")?;
            (i.config, i.devices) = (snap.config, snap.devices);
            s.write_data(server, born);
            Ok(())
        })
    }

    /// A person deletes a snapshot.
    pub fn delete_snapshot(&self, server: &str, at: &InstanceRef, name: &str) -> Result<(), String> {
        self.by_person(server, at, "deletes a snapshot of", |s, _| {
            s.remove_snapshot(server, at, name, None, "delete a snapshot")
                .map(|_| ())
                .map_err(|e| e.message)
        })
    }

    fn by_person(
        &self,
        server: &str,
        at: &InstanceRef,
        verb: &str,
        act: impl FnOnce(&mut State, u64) -> Result<(), String>,
    ) -> Result<(), String> {
        self.change(|s| {
            s.note("person", server, format!("{verb} {at}"));
            let line = s.log.len() - 1;
            s.foreign.insert((server.to_owned(), at.clone()));
            let born = s.servers.get(server).and_then(|h| h.instances.get(at)).map(|i| i.born);
            let result = born
                .ok_or_else(|| "Instance not found".to_owned())
                .and_then(|born| act(s, born));
            if let Some(entry) = s.log.get_mut(line) {
                entry.result = result.clone().err().unwrap_or_else(|| "ok".to_owned());
            }
            result
        })
    }

    /// The daemon takes that long to clear away what a guest that is down left; Incus shows it as running meanwhile
    /// (v6.0.4 driver_lxc.go, `onStop` and `statusCode`).
    pub fn clear_away(&self, server: &str, at: &InstanceRef, takes: Duration) {
        self.change(|s| {
            let instance = s.servers.get_mut(server).and_then(|h| h.instances.get_mut(at));
            if let Some(i) = instance.filter(|i| !i.runs()) {
                i.busy = Some(Busy {
                    action: "stop",
                    operation: None,
                });
                let born = i.born;
                s.later(takes, Due::ClearedAway(server.to_owned(), born));
            }
        });
    }

    /// The guest writes data; false if it does not run.
    pub fn write_data(&self, server: &str, at: &InstanceRef) -> bool {
        self.change(|s| {
            let running = s
                .servers
                .get(server)
                .and_then(|h| h.instances.get(at))
                .filter(|i| i.runs())
                .map(|i| i.born);
            if let Some(born) = running {
                s.note("guest", server, format!("{at} writes"));
                s.write_data(server, born);
            }
            running.is_some()
        })
    }

    /// The guest shuts itself down.
    pub fn guest_stops(&self, server: &str, at: &InstanceRef) {
        self.change(|s| {
            let born = s.servers.get(server).and_then(|h| h.instances.get(at)).map(|i| i.born);
            s.note("guest", server, format!("{at} shuts down"));
            if let Some(born) = born {
                s.guest_stops(server, born);
            }
        });
    }

    /// The whole host loses power and boots again.
    pub fn reboot(&self, server: &str) {
        self.power_off(server);
        self.power_on(server);
    }

    /// The whole host loses power.
    pub fn power_off(&self, server: &str) {
        self.happens(server, "loses power", |s| s.power_off(server));
    }

    /// The host boots.
    pub fn power_on(&self, server: &str) {
        self.happens(server, "boots", |s| s.power_on(server));
    }

    /// The daemon ends and begins again; instances go on.
    pub fn daemon_restart(&self, server: &str) {
        self.daemon_stop(server);
        self.daemon_start(server);
    }

    /// The daemon ends; instances go on.
    pub fn daemon_stop(&self, server: &str) {
        self.happens(server, "daemon ends", |s| s.daemon_down(server));
    }

    /// The daemon begins again.
    pub fn daemon_start(&self, server: &str) {
        self.happens(server, "daemon begins", |s| s.daemon_up(server));
    }

    /// Nobody reaches the server, other servers included.
    pub fn partition(&self, server: &str) {
        self.happens(server, "is cut off", |s| {
            if let Some(h) = s.servers.get_mut(server) {
                h.cut = true;
            }
        });
    }

    /// The server can be reached again.
    pub fn heal(&self, server: &str) {
        self.happens(server, "can be reached again", |s| {
            if let Some(h) = s.servers.get_mut(server) {
                h.cut = false;
            }
        });
    }

    /// Nobody reaches the server for so long.
    pub fn cut_off_for(&self, server: &str, duration: Duration) {
        self.partition(server);
        let server = server.to_owned();
        self.after(duration, move |w| w.heal(&server));
    }

    /// Those two servers do not reach each other from now on; everybody else reaches them.
    pub fn separate(&self, one: &str, other: &str) {
        self.change(|s| s.apart.insert((one.to_owned(), other.to_owned())));
    }

    /// Does something later.
    pub fn after(&self, duration: Duration, act: impl FnOnce(&World) + Send + 'static) {
        let world = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(duration).await;
            act(&world);
        });
    }

    /// The server forgets to send events while `on`.
    pub fn lose_events(&self, server: &str, on: bool) {
        self.happens(server, if on { "loses events" } else { "sends events again" }, |s| {
            if let Some(h) = s.servers.get_mut(server) {
                h.loses_events = on;
            }
        });
    }

    /// All event streams of the server end.
    pub fn close_events(&self, server: &str) {
        self.happens(server, "closes event streams", |s| {
            if let Some(h) = s.servers.get_mut(server) {
                h.listeners.clear();
            }
        });
    }

    /// A person evacuates a cluster member.
    pub fn evacuate(&self, server: &str, member: &str) {
        self.happens(server, &format!("{member} is evacuated"), |s| {
            s.evacuate(server, member);
        });
    }

    /// A person restores a cluster member.
    pub fn restore_member(&self, server: &str, member: &str) {
        self.happens(server, &format!("{member} is restored"), |s| {
            s.restore_member(server, member);
        });
    }

    /// A cluster member takes another state, without anything else.
    pub fn set_member(&self, server: &str, member: &str, status: MemberStatus) {
        let what = format!("{member} is {}", status.as_str());
        self.happens(server, &what, |s| s.set_member(server, member, status));
    }

    /// A person sets `cancel` in the spec of a record.
    pub fn cancel_move(&self, namespace: &str, name: &str) {
        self.happens("records", &format!("{name} is cancelled"), |s| {
            let version = s.next().to_string();
            if let Some(r) = s.records.get_mut(&(namespace.to_owned(), name.to_owned())) {
                r.spec.cancel = true;
                r.version = version;
            }
        });
    }

    fn happens(&self, server: &str, what: &str, f: impl FnOnce(&mut State)) {
        self.change(|s| {
            s.note("host", server, what);
            f(s);
        });
    }
}

impl State {
    fn add_instance(&mut self, server: &str, at: &InstanceRef, o: InstanceOptions) -> String {
        let (born, uuid, cloud_init, created_at) = (self.next(), self.fresh_uuid(), self.fresh_uuid(), self.moment());
        let Some(host) = self.servers.get(server) else {
            return uuid;
        };
        let mut i = Inst::new(born, o.kind, "x86_64", created_at);
        i.config = first_config(host.product, o.kind, &uuid, &cloud_init);
        (i.devices, i.profiles, i.ephemeral, i.guest) = (o.devices, o.profiles, o.ephemeral, o.guest);
        i.breaks = o.breaks;
        i.member = o.member.or_else(|| host.members.first().map(|m| m.name.clone()));
        (i.data, i.content) = (1, Content::Complete);
        i.config.extend(o.config);
        let (_, devices) = config::expand(host, &at.project, &i);
        i.pool = devices
            .values()
            .find(|d| config::is_root(d))
            .and_then(|d| d.get("pool"))
            .cloned()
            .unwrap_or_default();
        let mut n = born;
        config::add_hwaddrs(host, &at.project, &mut i, || {
            n += 0x1_0000;
            n
        });
        for name in o.snapshots {
            let created_at = self.moment();
            i.snapshots.push(Snap {
                name,
                created_at,
                config: i.config.clone(),
                devices: i.devices.clone(),
                data: 1,
            });
        }
        self.newest.insert(uuid.clone(), 1);
        self.foreign.insert((server.to_owned(), at.clone()));
        if let Some(host) = self.servers.get_mut(server) {
            host.instances.insert(at.clone(), i);
            host.lifecycle(at, "instance-created", None);
        }
        if o.running {
            self.run(server, born, None);
        }
        uuid
    }
}

fn first_config(product: Product, kind: InstanceKind, uuid: &str, cloud_init: &str) -> Config {
    let idmap = r#"[{"Isuid":true,"Isgid":false,"Hostid":1000000,"Nsid":0,"Maprange":1000000000}]"#;
    let mut config = pairs(&[
        ("image.os", "busybox"),
        (
            "volatile.base_image",
            "00b04b93a90fda3f5e7191e8bee1a680ec7cfee42de7fb873a128e79ebb81cfb",
        ),
        (marks::CLOUD_INIT_ID, cloud_init),
        ("volatile.last_state.power", "STOPPED"),
        ("volatile.uuid", uuid),
        ("volatile.uuid.generation", uuid),
    ]);
    if kind == InstanceKind::Container {
        config.extend(pairs(&[
            ("volatile.idmap.base", "0"),
            ("volatile.idmap.next", idmap),
            ("volatile.last_state.idmap", "[]"),
        ]));
    }
    if product == Product::Incus {
        config.insert("volatile.last_state.ready".to_owned(), "false".to_owned());
    }
    config
}

fn new_host(name: &str, n: usize, product: Product, o: &Options) -> Host {
    let (version, bridge) = match product {
        Product::Incus => ("6.0.4", "incusbr0"),
        Product::Lxd => ("5.0.2", "lxdbr0"),
    };
    let default = |project: &str| Profile {
        project: project.to_owned(),
        name: "default".to_owned(),
        config: Config::new(),
        devices: Devices::from([
            (
                "root".to_owned(),
                pairs(&[("type", "disk"), ("path", "/"), ("pool", "default")]),
            ),
            (
                "eth0".to_owned(),
                pairs(&[("type", "nic"), ("name", "eth0"), ("network", bridge)]),
            ),
        ]),
    };
    let own_profiles = |c: &Config| c.get("features.profiles").is_none_or(|v| v == "true");
    let mut projects = vec![Project {
        name: "default".to_owned(),
        config: Config::new(),
    }];
    let mut profiles = vec![default("default")];
    for (name, config) in &o.projects {
        let mut config = config.clone();
        if own_profiles(&config) {
            config.insert("features.profiles".to_owned(), "true".to_owned());
            profiles.push(default(name));
        }
        projects.push(Project {
            name: name.clone(),
            config,
        });
    }
    profiles.extend(o.profiles.iter().cloned());
    let network = Network {
        project: "default".to_owned(),
        name: bridge.to_owned(),
        managed: true,
    };
    let pool = |(name, driver): &(String, String)| Pool {
        name: name.clone(),
        driver: driver.clone(),
    };
    let member = |(name, groups): &(String, Vec<String>)| Member {
        name: name.clone(),
        status: MemberStatus::Online,
        architecture: "x86_64".to_owned(),
        groups: groups.clone(),
    };
    let btrfs = Pool {
        name: "default".to_owned(),
        driver: "btrfs".to_owned(),
    };
    Host {
        name: name.to_owned(),
        product,
        version: if o.version.is_empty() {
            version.to_owned()
        } else {
            o.version.clone()
        },
        fingerprint: format!("{n:064x}"),
        certificate: format!("-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n"),
        address: format!("10.0.0.{n}:8443"),
        pid: 1000,
        extensions: o.extensions(product),
        members: o.members.iter().map(member).collect(),
        pools: std::iter::once(btrfs).chain(o.pools.iter().map(pool)).collect(),
        projects,
        profiles,
        networks: std::iter::once(network).chain(o.networks.iter().cloned()).collect(),
        criu: o.criu,
        timing: o.timing.unwrap_or_else(|| Timing::of(product)),
        up: true,
        cut: false,
        instances: std::collections::BTreeMap::new(),
        operations: std::collections::BTreeMap::new(),
        listeners: Vec::new(),
        loses_events: false,
    }
}
