//! `InstanceServer`: one Incus or LXD server, or one cluster of them.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::is_false;
use crate::schema::set;
use crate::{Condition, GoDuration, Name, Transfer, schema};

/// How one Incus or LXD server, or one cluster, is reached and how much it may be used.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "InstanceServer",
    plural = "instanceservers",
    shortname = "isrv",
    category = "berth",
    namespaced,
    derive = "PartialEq",
    status = "InstanceServerStatus",
    doc = "One Incus or LXD server, or one cluster of them.",
    printcolumn(name = "Product", type_ = "string", json_path = ".status.product"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version"),
    printcolumn(name = "Instances", type_ = "integer", json_path = ".status.instances"),
    printcolumn(name = "Members", type_ = "integer", json_path = ".status.memberCount"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Cordoned", type_ = "boolean", json_path = ".spec.cordoned"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.addresses.all(a, a.matches('^https://[^/?#@]+/?$'))")
        .message("addresses must be https://host:port, without a path; servers are never spoken to without TLS"),
    validation = Rule::new(format!("!{} || self.peerAddress.matches('^https://[^/?#@]+/?$')", set("self.peerAddress")))
        .message("peerAddress must be https://host:port, without a path; servers are never spoken to without TLS"),
    validation = Rule::new("has(self.serverCertificate) || has(self.credentials.trustTokenRef)")
        .message("serverCertificate is required, unless credentials.trustTokenRef is set: add its fingerprint (`incus info | grep fingerprint`), pem or systemRoots: true"),
    validation = Rule::new("duration(self.interval) >= duration('1s')").message("interval must be at least 1s"),
)]
pub struct InstanceServerSpec {
    /// Addresses of the API, `https://host:port`; for a cluster those of several members. The first that answers is used.
    #[schemars(schema_with = "schema::addresses")]
    pub addresses: Vec<String>,
    /// Address under which other servers reach this one, where it differs: `https://host:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub peer_address: Option<String>,
    /// Client certificate for the server: exactly one of `secretRef` and `trustTokenRef`.
    pub credentials: Credentials,
    /// How the server's own certificate is checked: exactly one of `pem`, `fingerprint` and `systemRoots`.
    /// May be absent only with `credentials.trustTokenRef`, since a trust token carries the fingerprint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_certificate: Option<ServerCertificate>,
    /// No instance may be moved to this server any more; those that are here stay.
    #[serde(default)]
    pub cordoned: bool,
    /// How many moves run at the same time.
    #[serde(default)]
    pub limits: Limits,
    /// Whether live moves to and from other independent servers are allowed.
    #[serde(default)]
    pub live: LivePolicy,
    /// Allow `raw.*`, `security.privileged` and host devices in overrides. Whoever may write placements then is root on the server.
    #[serde(default)]
    pub allow_unsafe_overrides: bool,
    /// How often everything is listed anew. Events make that rarely needed.
    #[serde(default = "default_interval")]
    #[schemars(extend("default" = "5m"))]
    pub interval: GoDuration,
}

fn default_interval() -> GoDuration {
    GoDuration::from_secs(300)
}

impl Default for InstanceServerSpec {
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            peer_address: None,
            credentials: Credentials::default(),
            server_certificate: None,
            cordoned: false,
            limits: Limits::default(),
            live: LivePolicy::default(),
            allow_unsafe_overrides: false,
            interval: default_interval(),
        }
    }
}

/// Client certificate for a server: exactly one of the two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.secretRef) != has(self.trustTokenRef)")
        .message("credentials needs exactly one of secretRef (a client certificate) and trustTokenRef (a token to join with)"),
)]
pub struct Credentials {
    /// Secret of type kubernetes.io/tls with the client certificate (`tls.crt`) and its key (`tls.key`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<Name>,
    /// Secret with a trust token (`incus config trust add` or `lxc config trust add`). A certificate is made, joined with the token,
    /// and kept in Secret `<name of this object>-client`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_token_ref: Option<SecretKey>,
}

/// One key of a Secret in the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key within the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// How a server's certificate is checked: exactly one of the three.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(format!("[{}, {}, has(self.systemRoots) && self.systemRoots].filter(x, x).size() == 1", set("self.pem"), set("self.fingerprint")))
        .message("serverCertificate needs exactly one of pem, fingerprint and systemRoots: true"),
    validation = Rule::new(format!("!{} || self.fingerprint.matches('^[0-9a-fA-F]{{64}}$')", set("self.fingerprint")))
        .message("fingerprint must be the SHA-256 of the certificate, 64 hex digits: `incus info | grep fingerprint`"),
    validation = Rule::new(format!("!{} || self.pem.contains('-----BEGIN CERTIFICATE-----')", set("self.pem")))
        .message("pem must be a certificate in PEM form, beginning with -----BEGIN CERTIFICATE-----"),
)]
pub struct ServerCertificate {
    /// The certificate itself, or that of the authority that issued it, as PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 65536))]
    pub pem: Option<String>,
    /// SHA-256 of the certificate, 64 hex digits, as `incus info` shows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub fingerprint: Option<String>,
    /// The certificate is valid by the system's certificate authorities and for the host in the address.
    #[serde(default, skip_serializing_if = "is_false")]
    pub system_roots: bool,
}

/// How many moves run at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Limits {
    /// Moves to this server.
    #[schemars(range(min = 0, max = 1000))]
    pub incoming: i32,
    /// Moves away from this server.
    #[schemars(range(min = 0, max = 1000))]
    pub outgoing: i32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            incoming: 2,
            outgoing: 2,
        }
    }
}

/// Whether live moves are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LivePolicy {
    /// Allow live moves to and from another independent server, where both guests run for a moment.
    pub between_servers: bool,
}

impl Default for LivePolicy {
    fn default() -> Self {
        Self { between_servers: true }
    }
}

/// What the controller found out about a server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceServerStatus {
    /// The metadata.generation that this status was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready always; Reconciling and Stalled only while true.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
    /// Incus or LXD.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub product: Option<String>,
    /// Version of the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub version: Option<String>,
    /// SHA-256 of the server's (or cluster's) certificate. Two objects of the same fingerprint are the same server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub fingerprint: Option<String>,
    /// The address in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub address: Option<String>,
    /// Whether this is a cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clustered: Option<bool>,
    /// Members of the cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub members: Vec<Member>,
    /// Storage pools.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub pools: Vec<Pool>,
    /// Number of instances in all projects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub instances: Option<i64>,
    /// Number of members; 1 for a server that is no cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub member_count: Option<i64>,
    /// Which way of transfer worked last, per source.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["from"]))]
    pub transfers: Vec<TransferMemory>,
    /// What the server can do, as far as it matters for moves.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::names")]
    pub capabilities: Vec<String>,
}

/// A member of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// Name of the member.
    #[schemars(length(max = 253))]
    pub name: String,
    /// State as the cluster reports it: Online, Offline, Evacuated, Blocked.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub status: String,
    /// Architecture, for example x86_64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub architecture: Option<String>,
    /// Cluster groups that it belongs to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::names")]
    pub groups: Vec<String>,
}

/// A storage pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pool {
    /// Name of the pool.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Storage driver, for example zfs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub driver: String,
}

/// Which way of transfer worked last from one source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TransferMemory {
    /// Name of the source's InstanceServer.
    #[schemars(length(max = 253))]
    pub from: String,
    /// The way that worked: Pull, Push, Relay or Backup.
    pub mode: Transfer,
    /// Versions of both servers and how each is reached by the other, when it worked. Where they are others now, it is
    /// found out anew.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 2048))]
    pub under: String,
}
