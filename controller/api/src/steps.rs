//! Steps and outcomes of a move. Plain texts in the schema, so that an older program can still read a newer record.

/// A step of a move. The order is that of a move between servers; Restoring and Undoing stand apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The record exists, nothing has been done.
    Accepted,
    /// Both servers have been looked at and the source carries the marks.
    Marked,
    /// A round of copying while the instance runs is complete (Warm).
    Precopied,
    /// The running state is being moved (Live).
    Restoring,
    /// The source is stopped and guarded.
    Stopped,
    /// The copy on the target is complete.
    Transferred,
    /// The copy has been compared with the source and has its real name.
    Verified,
    /// The copy on the target is the instance. No way back.
    Committed,
    /// It runs on the target, if it is to run.
    Started,
    /// The source is retired.
    Retired,
    /// Nothing of the move is left.
    Cleaned,
    /// The source is made what it was and the copy is removed.
    Undoing,
}

impl Step {
    /// All steps.
    pub const ALL: [Self; 12] = [
        Self::Accepted,
        Self::Marked,
        Self::Precopied,
        Self::Restoring,
        Self::Stopped,
        Self::Transferred,
        Self::Verified,
        Self::Committed,
        Self::Started,
        Self::Retired,
        Self::Cleaned,
        Self::Undoing,
    ];

    /// The name as written in objects.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::Marked => "Marked",
            Self::Precopied => "Precopied",
            Self::Restoring => "Restoring",
            Self::Stopped => "Stopped",
            Self::Transferred => "Transferred",
            Self::Verified => "Verified",
            Self::Committed => "Committed",
            Self::Started => "Started",
            Self::Retired => "Retired",
            Self::Cleaned => "Cleaned",
            Self::Undoing => "Undoing",
        }
    }

    /// The step of that name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|step| step.as_str() == text)
    }

    /// Whether the target has taken over: from here on a move only goes forward.
    pub const fn is_committed(self) -> bool {
        match self {
            Self::Committed | Self::Started | Self::Retired | Self::Cleaned => true,
            Self::Accepted
            | Self::Marked
            | Self::Precopied
            | Self::Restoring
            | Self::Stopped
            | Self::Transferred
            | Self::Verified
            | Self::Undoing => false,
        }
    }
}

/// How a move ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The instance is on the target.
    Succeeded,
    /// The instance is where it was.
    Undone,
    /// The instance is where it was, because a person cancelled the move.
    Cancelled,
    /// It cannot be settled safely; the record says what to do.
    NeedsAttention,
}

impl Outcome {
    /// All outcomes.
    pub const ALL: [Self; 4] = [Self::Succeeded, Self::Undone, Self::Cancelled, Self::NeedsAttention];

    /// The name as written in objects.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "Succeeded",
            Self::Undone => "Undone",
            Self::Cancelled => "Cancelled",
            Self::NeedsAttention => "NeedsAttention",
        }
    }

    /// The outcome of that name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.as_str() == text)
    }
}
