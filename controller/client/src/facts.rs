//! Everything that one server is and has, read in one go: `/1.0`, projects, pools, profiles, networks, members, groups.

use std::collections::BTreeSet;

use berth_core::model::{Network, Processor, Product, Profile, Project, ServerFacts};
use berth_core::server::{FailureKind, Result};
use futures::future::try_join_all;
use futures::{TryFutureExt, try_join};

use crate::http::{Call, HttpServer};
use crate::observe::RequestClass;
use crate::path;
use crate::wire::{GroupWire, MemberWire, NetworkWire, PoolWire, ProfileWire, ProjectWire, ResourcesWire, ServerWire};

impl HttpServer {
    /// Everything the server is and has.
    pub(crate) async fn read_facts(&self) -> Result<ServerFacts> {
        let server = self.read_server().await?;
        let extensions: BTreeSet<String> = server.api_extensions.into_iter().collect();
        let environment = server.environment;
        let projects: Vec<ProjectWire> = self.list(&projects_call()).await?;
        let projects: Vec<Project> = projects.into_iter().map(Project::from).collect();
        let clustered = environment.server_clustered;
        let grouped = clustered && extensions.contains("clustering_groups");
        let (pools, profiles, networks, members, groups) = try_join!(
            self.pools(),
            self.profiles(&projects, extensions.contains("profiles_all_projects")),
            self.networks(&projects, extensions.contains("networks_all_projects")),
            self.list_if::<Vec<MemberWire>>(
                clustered,
                "/1.0/cluster/members?recursion=1",
                "list the cluster members"
            ),
            self.list_if::<Vec<GroupWire>>(grouped, "/1.0/cluster/groups?recursion=1", "list the cluster groups"),
        )?;
        let pools = match pools {
            Some(pools) => pools,
            None => self.pools_of(&profiles).await?,
        };
        let product = self.product(&environment.server)?;
        let qemu = environment.qemu();
        let processor = match qemu {
            Some(_) if !clustered => self.processor().await?,
            Some(_) | None => None,
        };
        let runs = |driver: &str| environment.driver.split('|').any(|d| d.trim() == driver);
        Ok(ServerFacts {
            product,
            version: environment.server_version,
            fingerprint: environment.certificate_fingerprint.to_ascii_lowercase(),
            certificate: environment.certificate,
            name: environment.server_name,
            pid: environment.server_pid,
            clustered,
            addresses: environment.addresses,
            architectures: environment.architectures,
            containers: runs("lxc"),
            virtual_machines: runs("qemu"),
            qemu,
            processor,
            extensions,
            members: members.into_iter().map(Into::into).collect(),
            groups: groups.into_iter().map(|g| g.name).collect(),
            pools: pools.into_iter().map(Into::into).collect(),
            projects,
            profiles,
            networks,
        })
    }

    /// The names of the projects that this client may see.
    pub(crate) async fn project_names(&self) -> Result<Vec<String>> {
        let projects: Vec<ProjectWire> = self.list(&projects_call()).await?;
        Ok(projects.into_iter().map(|p| Project::from(p).name).collect())
    }

    /// The API extensions that the server announces.
    pub(crate) async fn extensions(&self) -> Result<BTreeSet<String>> {
        Ok(self.read_server().await?.api_extensions.into_iter().collect())
    }

    async fn read_server(&self) -> Result<ServerWire> {
        let call = facts_call("/1.0", "read the server");
        let (server, _) = self.read::<ServerWire>(&call).await?;
        if server.auth != "trusted" {
            return Err(self.error(
                &call,
                FailureKind::NotTrusted,
                "the server does not trust our certificate",
            ));
        }
        Ok(server)
    }

    fn product(&self, name: &str) -> Result<Product> {
        match name {
            "incus" => Ok(Product::Incus),
            "lxd" => Ok(Product::Lxd),
            other => {
                let message = format!("it is neither Incus nor LXD but {other:?}");
                Err(self.error(&facts_call("/1.0", "read the server"), FailureKind::Protocol, message))
            }
        }
    }

    async fn list_if<T: serde::de::DeserializeOwned + Default>(&self, ask: bool, path: &str, what: &str) -> Result<T> {
        if ask {
            self.list(&facts_call(path, what)).await
        } else {
            Ok(T::default())
        }
    }

    /// The processors; `None` if this client may not see them.
    async fn processor(&self) -> Result<Option<Processor>> {
        match self
            .read::<ResourcesWire>(&facts_call("/1.0/resources", "read the resources"))
            .await
        {
            Ok((resources, _)) => Ok(resources.processor()),
            Err(e) if matches!(e.kind, FailureKind::Refused | FailureKind::NotFound) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// All pools; `None` if this client may not list them (Incus 6.0 refuses that to restricted certificates).
    async fn pools(&self) -> Result<Option<Vec<PoolWire>>> {
        let call = facts_call("/1.0/storage-pools?recursion=1", "list the storage pools");
        match self.list(&call).await {
            Ok(pools) => Ok(Some(pools)),
            Err(e) if e.kind == FailureKind::Refused => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The pools that the profiles name: each by itself may be read.
    async fn pools_of(&self, profiles: &[Profile]) -> Result<Vec<PoolWire>> {
        let disks = profiles.iter().flat_map(|p| p.devices.values());
        let names: BTreeSet<&String> = disks.filter_map(|d| d.get("pool")).collect();
        try_join_all(names.into_iter().map(|name| async move {
            let path = format!("/1.0/storage-pools/{}", path::encode(name));
            let call = facts_call(&path, &format!("read the storage pool {name}"));
            self.read(&call).map_ok(|(pool, _)| pool).await
        }))
        .await
    }

    async fn profiles(&self, projects: &[Project], bulk: bool) -> Result<Vec<Profile>> {
        let (base, what) = ("/1.0/profiles?recursion=1", "list the profiles");
        let lists = self
            .per_project::<ProfileWire>(base, what, bulk, owners(projects, "features.profiles"))
            .await?;
        Ok(lists
            .into_iter()
            .flat_map(|(p, list)| list.into_iter().map(move |w| w.into_model(&p)))
            .collect())
    }

    async fn networks(&self, projects: &[Project], bulk: bool) -> Result<Vec<Network>> {
        let (base, what) = ("/1.0/networks?recursion=1", "list the networks");
        let lists = self
            .per_project::<NetworkWire>(base, what, bulk, owners(projects, "features.networks"))
            .await?;
        Ok(lists
            .into_iter()
            .flat_map(|(p, list)| list.into_iter().map(move |w| w.into_model(&p)))
            .collect())
    }

    /// Lists of each project; one request for all where the server can.
    async fn per_project<T: serde::de::DeserializeOwned>(
        &self,
        base: &str,
        what: &str,
        bulk: bool,
        owners: Vec<Owner>,
    ) -> Result<Vec<(String, Vec<T>)>> {
        if bulk {
            let call = facts_call(&format!("{base}&all-projects=true"), what);
            return Ok(vec![("default".to_owned(), self.list(&call).await?)]);
        }
        try_join_all(owners.into_iter().map(|owner| async move {
            let call = facts_call(&path::with_query(base.to_owned(), "project", &owner.ask), what);
            self.list(&call).map_ok(|list| (owner.project, list)).await
        }))
        .await
    }
}

/// A project that has things of its own, and the project to ask for them.
struct Owner {
    project: String,
    ask: String,
}

/// The projects that have their own things of that kind; the others see `default`'s, and show them to a client that
/// may not see `default` itself.
fn owners(projects: &[Project], feature: &str) -> Vec<Owner> {
    let (own, lent): (Vec<&Project>, Vec<&Project>) = projects.iter().partition(|p| p.feature(feature));
    let hidden = !own.iter().any(|p| p.name == "default");
    let through = lent.first().filter(|_| hidden).map(|p| ("default", p.name.as_str()));
    let own = own.into_iter().map(|p| (p.name.as_str(), p.name.as_str()));
    let all = own.chain(through).map(|(project, ask)| Owner {
        project: project.to_owned(),
        ask: ask.to_owned(),
    });
    all.collect()
}

fn projects_call() -> Call {
    facts_call("/1.0/projects?recursion=1", "list the projects")
}

fn facts_call(path: &str, what: &str) -> Call {
    Call::get(RequestClass::Facts, path, what)
}
