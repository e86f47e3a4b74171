//! The gateway's terms as plain values: keys, ids, runs, messages. No I/O, no async.

mod access;
mod content;
mod fingerprint;
mod id;
mod key;
mod lifecycle;
mod limits;
mod metadata;
mod records;
mod removal;
mod run;
mod trace;
mod transition;

pub use access::{Access, Principal};
pub use content::{
    ContentPart, File, ImageFile, ImageUrl, InvalidContent, MAX_PARTS, UserContent, text_or_parts,
};
pub use fingerprint::{Fingerprints, KeyNames};
pub use id::{
    DeletionId, InvalidId, KeyId, MessageId, OrphanId, ReplicaId, RunId, ThreadId, UpstreamRunId,
    UpstreamThreadId, now, set_clock,
};
pub use key::{
    ConversationKey, InvalidKey, KeyText, Scope, SessionKey, TenantKey, TopicKey, UserKey,
};
pub use lifecycle::{LifecycleTask, Lifetimes, NewLife, RetentionPolicy, Ttl};
pub use limits::Limits;
pub use metadata::{InvalidMetadata, Metadata};
pub use records::{
    Lifecycle, Message, Page, PageRequest, Role, Run, Thread, ThreadActivity, ThreadState,
};
pub use removal::{Deletion, Left, Removed, UpstreamOutcome};
pub use run::{
    MultitaskStrategy, RequiredAction, RunError, RunErrorCode, RunStatus, ToolCall, ToolOutput,
    Usage,
};
pub use trace::{Baseline, EventBatch, LoggedEvent, UnsettledRun, UpstreamSync};
pub use transition::{IllegalTransition, Step};

/// A point in time, UTC. The database's clock gives it, never this process's clock.
pub type Timestamp = chrono::DateTime<chrono::Utc>;
