//! From rows to values.

use sqlx::FromRow;
use sqlx::types::Json;
use uuid::Uuid;

use crate::domain::{KeyId, RemnantId, Removed, TenantKey, ThreadId};
use crate::store::rows::{At, ThreadRow, corrupt, word};
use crate::store::{
    Deletable, DeletedThread, Due, NewKey, Remnant, RemnantKind, RemnantName, StoreError, StoredKey,
};

#[derive(FromRow)]
pub(in crate::store) struct DueRow {
    #[sqlx(flatten)]
    thread: ThreadRow,
    now: At,
    attempts: i64,
}

impl TryFrom<DueRow> for Due {
    type Error = StoreError;

    fn try_from(row: DueRow) -> Result<Self, StoreError> {
        Ok(Self { thread: row.thread.try_into()?, now: row.now.0, attempts: row.attempts, claimed: None })
    }
}

#[derive(FromRow)]
pub(in crate::store) struct RemnantRow {
    id: Uuid,
    thread_id: Uuid,
    upstream: String,
    kind: String,
    upstream_id: Option<String>,
    attempts: i64,
}

impl RemnantRow {
    pub(in crate::store) fn id(&self) -> Uuid {
        self.id
    }
}

impl TryFrom<RemnantRow> for Remnant {
    type Error = StoreError;

    fn try_from(row: RemnantRow) -> Result<Self, StoreError> {
        Ok(Self {
            name: RemnantName::Row(RemnantId::from_uuid(row.id)),
            thread: ThreadId::from_uuid(row.thread_id),
            upstream: row.upstream,
            kind: match &*row.kind {
                "thread" => RemnantKind::Thread,
                "run" => RemnantKind::Run,
                _ => return Err(corrupt("the kind of a remnant")),
            },
            upstream_id: row.upstream_id,
            attempts: row.attempts,
        })
    }
}

/// All ids that a run has upstream, the earliest first.
pub(in crate::store) fn upstream_ids(
    newest: Option<String>,
    earlier: Option<Json<Vec<String>>>,
) -> impl Iterator<Item = String> {
    earlier.map(|json| json.0).unwrap_or_default().into_iter().chain(newest)
}

/// A request to delete that is not finished.
#[derive(FromRow)]
pub(in crate::store) struct RequestedRow {
    pub(in crate::store) id: Uuid,
    pub(in crate::store) tenant: String,
    pub(in crate::store) user_key: String,
    pub(in crate::store) scope_kind: Option<String>,
    pub(in crate::store) scope_name: Option<String>,
    pub(in crate::store) archive: bool,
}

/// A request to delete, and how far it came.
#[derive(FromRow)]
pub(in crate::store) struct DeletionRow {
    pub(in crate::store) user_key: Option<String>,
    pub(in crate::store) user_fingerprint: Option<String>,
    pub(in crate::store) requested_at: At,
    pub(in crate::store) finished_at: Option<At>,
    pub(in crate::store) archive: bool,
    pub(in crate::store) done: i64,
    pub(in crate::store) pending: i64,
    pub(in crate::store) incomplete: i64,
}

/// What a request to delete would take.
#[derive(FromRow)]
pub(in crate::store) struct DeletableRow {
    threads: i64,
    messages: i64,
    runs: i64,
    unfinished_runs: i64,
}

impl From<DeletableRow> for Deletable {
    fn from(row: DeletableRow) -> Self {
        let DeletableRow { threads, messages, runs, unfinished_runs } = row;
        Self { threads, messages, runs, unfinished_runs }
    }
}

#[derive(FromRow)]
pub(in crate::store) struct DeletedThreadRow {
    thread_id: Uuid,
    upstream: String,
    messages: i64,
    runs: i64,
    removed: Option<Json<Removed>>,
    finished_at: Option<At>,
    attempts: i64,
    last_failure: Option<String>,
}

impl From<DeletedThreadRow> for DeletedThread {
    fn from(row: DeletedThreadRow) -> Self {
        Self {
            id: ThreadId::from_uuid(row.thread_id),
            upstream: row.upstream,
            messages: row.messages,
            runs: row.runs,
            removed: row.removed.map(|json| json.0).unwrap_or_default(),
            finished_at: row.finished_at.map(|at| at.0),
            attempts: row.attempts,
            last_failure: row.last_failure,
        }
    }
}

#[derive(FromRow)]
pub(in crate::store) struct KeyRow {
    id: Uuid,
    prefix: String,
    hash: Vec<u8>,
    tenant: String,
    access: String,
    label: String,
    created_at: At,
    revoked_at: Option<At>,
}

impl TryFrom<KeyRow> for StoredKey {
    type Error = StoreError;

    fn try_from(row: KeyRow) -> Result<Self, StoreError> {
        Ok(Self {
            key: NewKey {
                id: KeyId::from_uuid(row.id),
                prefix: row.prefix,
                hash: row.hash.try_into().map_err(|_| corrupt("a hash of another length"))?,
                tenant: TenantKey::try_from(row.tenant).map_err(|_| corrupt("a tenant that is no key"))?,
                access: word(&row.access)?,
                label: row.label,
            },
            created_at: row.created_at.0,
            revoked_at: row.revoked_at.map(|at| at.0),
        })
    }
}
