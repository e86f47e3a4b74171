//! The gateway's terms as plain values: keys, ids, runs, messages. No I/O, no async.

mod access;
mod content;
mod fingerprint;
mod id;
mod key;
mod lifecycle;
mod limits;
mod made_call;
mod metadata;
mod records;
mod recovery;
mod removal;
mod reply_text;
mod run;
mod tool_call;
mod trace;
mod transition;

pub use access::{Access, Principal, Reader};
pub use content::{
    Annotation, ContentPart, File, GeneratedImage, ImageFile, ImageUrl, InvalidContent, MAX_PARTS,
    Origin, Phase, UserContent, add_calls, answer_calls, append_messages, messages_of,
    next_message, number_messages, says_something, size_of_annotation, text_or_parts,
    with_calls_of,
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
pub use made_call::{MadeCall, kept};
pub use metadata::{InvalidMetadata, Metadata};
pub use records::{
    Lifecycle, Message, Page, PageRequest, Role, Run, Thread, ThreadActivity, ThreadState,
};
pub use recovery::{
    HistoryKept, KnownRefusal, Omitted, Recovery, RecoveryCause, RunRecovery, Trial,
};
pub use removal::{Deletion, Left, Removed, UpstreamOutcome};
#[cfg(test)]
pub(crate) use reply_text::tests as reply_texts;
pub use reply_text::{ReplyText, TextDelta};
pub use run::{MultitaskStrategy, Rerun, RunError, RunErrorCode, RunStatus, Usage};
pub use tool_call::{
    CallAnswer, OutputContent, OutputPart, RequiredAction, ToolCall, ToolCallType, ToolOutput,
};
pub use trace::{Baseline, EventBatch, LoggedEvent, UnsettledRun, UpstreamSync};
pub use transition::{IllegalTransition, Step};

/// A point in time, UTC. The database's clock gives it, never this process's clock.
pub type Timestamp = chrono::DateTime<chrono::Utc>;
