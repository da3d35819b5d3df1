//! Every reason that a condition, a plan or an error of Berth can carry. The same name everywhere; a reason that is
//! not in this list does not exist. Step and outcome names ([`crate::Step`], [`crate::Outcome`]) serve as the reasons of
//! an InstanceMove's Ready condition.

/// What a reason means for the conditions Ready, Reconciling and Stalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReasonKind {
    /// Ready is True.
    Ready,
    /// Ready is False, Reconciling is True: it goes on by itself.
    InProgress,
    /// Ready is False and nothing else: it waits, as it was told to.
    Waiting,
    /// Ready is False, Stalled is True: a person is needed.
    Stalled,
    /// Ready is Unknown, Reconciling is True: the servers have not said yet.
    Unknown,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident => $kind:ident,)+) => {
        /// Why something is as it is, in one word.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Reason {
            /// Every reason.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// The name as written in objects.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }

            /// What it means for the conditions.
            pub const fn kind(self) -> ReasonKind {
                match self { $(Self::$name => ReasonKind::$kind,)+ }
            }

            /// What it says, in a sentence: the text of the user documentation.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

reasons! {
    // InstanceServer
    /// The server answers and trusts the certificate.
    Connected => Ready,
    /// The server is being contacted for the first time.
    Connecting => Unknown,
    /// None of the addresses answers; it is tried again.
    Unreachable => InProgress,
    /// The server shows another certificate than the one that is expected.
    CertificateMismatch => Stalled,
    /// The server does not know the client certificate, or restricts it too much.
    NotTrusted => Stalled,
    /// The Secret or its key does not exist.
    CredentialsMissing => Stalled,
    /// The Secret holds no usable certificate and key, or belongs to somebody else.
    CredentialsInvalid => Stalled,
    /// The trust token has been used or has expired, and no certificate was joined with it.
    TokenUsed => Stalled,
    /// The server is neither Incus nor LXD, or too old.
    UnsupportedServer => Stalled,
    /// Another InstanceServer of the namespace is the same server.
    DuplicateServer => Stalled,

    // InstancePlacement
    /// The instance is where and as the spec says.
    InPlace => Ready,
    /// A move is under way.
    Moving => InProgress,
    /// The configuration or the power state is being changed where the instance is.
    Updating => InProgress,
    /// A move waits for a slot, or for another placement to let go of the instance.
    Pending => InProgress,
    /// The last move was undone after a failure; the next attempt is at the time that the message names.
    MoveFailed => InProgress,
    /// Somebody else is working on the instance (an evacuation, a backup, a migration); it is left alone until that ends.
    ForeignOperation => InProgress,
    /// One server does not reach the other under the address that it was told; with `transfer: Auto` the next way is tried.
    PeerUnreachable => InProgress,
    /// A guest did not shut down in time and may still do so; the move is undone as soon as the server lets go.
    StopPending => InProgress,
    /// Marks of a move that ended long ago came back with a snapshot and are taken off.
    StaleMarks => InProgress,
    /// A server that must be asked does not answer.
    ServerUnreachable => Unknown,
    /// The first look is not finished.
    Progressing => Unknown,
    /// A move is due and waits for its window to open.
    WaitingForWindow => Waiting,
    /// A move is due and waits for a person to approve its digest.
    WaitingForApproval => Waiting,
    /// Something differs and mode is Observe.
    DriftObserved => Waiting,
    /// The object is suspended.
    Suspended => Waiting,
    /// No server has this instance (any more).
    InstanceNotFound => Stalled,
    /// Several instances have this name; `spec.instance.server` or `uuid` says which is meant.
    AmbiguousInstance => Stalled,
    /// Another placement has this instance.
    ClaimedByAnother => Stalled,
    /// There is no InstanceServer of this name.
    ServerNotFound => Stalled,
    /// The cluster has no such member.
    MemberNotFound => Stalled,
    /// The member is offline or evacuated.
    MemberOffline => Stalled,
    /// The cluster has no such group, or the group has no member that can take the instance.
    GroupNotFound => Stalled,
    /// The target has no such storage pool.
    PoolNotFound => Stalled,
    /// The target has no such project.
    ProjectNotFound => Stalled,
    /// The target has no such profile.
    ProfileNotFound => Stalled,
    /// The target has no such network.
    NetworkNotFound => Stalled,
    /// A profile of the same name says something else on the target.
    ProfileDiffers => Stalled,
    /// The target's processors cannot run the instance.
    ArchitectureMismatch => Stalled,
    /// None of the allowed methods is possible; the plan says why and what makes each possible.
    MethodImpossible => Stalled,
    /// A live move needs `migration.stateful` on the instance.
    MigrationStatefulOff => Stalled,
    /// `migration.stateful` is set, but only from the instance's next start on.
    MigrationStatefulPending => Stalled,
    /// The root disk's `size.state` cannot hold the memory of the virtual machine.
    StateSizeTooSmall => Stalled,
    /// A folder that the instance shares with its host keeps its running state from being moved.
    SharedFilesystem => Stalled,
    /// A device of the host keeps the running state from being moved.
    LocalDevice => Stalled,
    /// The target's processors lack something that the running guest was started with.
    CpuMismatch => Stalled,
    /// The two servers run different versions of QEMU.
    QemuMismatch => Stalled,
    /// The two servers' products or versions do not understand each other's running state.
    VersionMismatch => Stalled,
    /// CRIU, which moves running containers, is not installed on both servers.
    CriuMissing => Stalled,
    /// A volume of the instance is not on storage that both ends share.
    PoolNotShared => Stalled,
    /// The target already has another instance of this name.
    NameTaken => Stalled,
    /// The target is cordoned.
    TargetCordoned => Stalled,
    /// The target refused the instance; the message is its own.
    TargetRefused => Stalled,
    /// What happened cannot be settled safely by a program; the move's record says what to do.
    NeedsAttention => Stalled,
    /// A person cancelled the move; change the spec or request a reconcile to start another.
    MoveCancelled => Stalled,
    /// The snapshots cannot be brought to the target; `snapshots: Exclude` leaves them out.
    SnapshotsCannotTravel => Stalled,
    /// The target's pool has too little space.
    InsufficientSpace => Stalled,
    /// A disk attaches a custom volume that the target does not have.
    VolumeNotFound => Stalled,
    /// The instance has backups, and a server does not move one that has.
    BackupsInTheWay => Stalled,
    /// A device belongs to the host it is on.
    HostDevice => Stalled,
    /// The project's restrictions refuse the instance.
    ProjectRestricted => Stalled,
    /// The project's restrictions refuse transfers by pull.
    RestrictedPull => Stalled,
    /// The project's restrictions refuse snapshots.
    RestrictedSnapshots => Stalled,
    /// The project's restrictions refuse backups.
    RestrictedBackups => Stalled,
    /// The project's restrictions would let cloud-init run again on the target.
    CloudInitWouldRerun => Stalled,
    /// The target cannot read the source's backups.
    BackupNotReadable => Stalled,
    /// A copy cannot be deleted, or a standby neither refreshed nor started; the message has the host's command.
    LeftoverVolume => Stalled,
    /// A copy under one of Berth's names belongs to no record; it is never deleted by itself.
    Leftover => Stalled,
    /// The spec asks for something that no server accepts.
    InvalidSpec => Stalled,
    /// The move is expected to stop the instance for longer than `maxDowntime`.
    DowntimeTooLong => Stalled,
    /// Between these two pools every round of a Warm move sends everything again, so it would be no better than a Cold one.
    NotIncremental => Stalled,
    /// The guest stands still while it is copied from its pool, so a Warm move would be no better than a Cold one.
    GuestFrozen => Stalled,

    // InstanceCopy
    /// The copy is as fresh as it should be.
    UpToDate => Ready,
    /// The copy is being made or refreshed.
    Copying => InProgress,
    /// The last refresh failed; the next attempt is at the time that the message names.
    RefreshFailed => InProgress,
    /// Somebody started the copy; it is not overwritten any more.
    CopyWasUsed => Stalled,
    /// What is to be copied does not exist.
    SourceNotFound => Stalled,
}

impl Reason {
    /// The reason of that name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.as_str() == text)
    }

    /// Whether it reports something missing, which for its first ten seconds counts as in progress:
    /// in a first sync the server may be created after the placement.
    pub fn is_not_found(self) -> bool {
        self.as_str().ends_with("NotFound")
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
