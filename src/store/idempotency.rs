//! What was accepted before under an idempotency key.

use std::time::Duration;

use sqlx::FromRow;

use super::errors::StoreError;
use super::handle::Store;
use super::params::params;
use super::rows::{ThreadAndRun, corrupt, millis};
use super::statement::Statement;
use crate::domain::{ConversationKey, Run, Thread};

/// The whole statement reads the table as it was before its deletion, hence the last condition of
/// `used`.
static FIND_REPEATED: Statement = Statement::for_each_engine(
    "admission.find_repeated",
    "WITH forgotten AS (
        DELETE FROM idempotency_keys t
        WHERE {of_key} AND t.key = :idempotency_key AND {forgotten t, :remember}
        RETURNING t.run_id
    ), used AS MATERIALIZED (
        SELECT t.run_id, t.request_hash FROM idempotency_keys t
        WHERE {of_key} AND t.key = :idempotency_key AND NOT EXISTS (SELECT FROM forgotten)
    )
    SELECT u.request_hash, {thread t}, {run r}
    FROM used u
    CROSS JOIN LATERAL (SELECT * FROM runs o WHERE o.id = u.run_id LIMIT 1) r
    CROSS JOIN LATERAL (SELECT * FROM threads o WHERE o.id = r.thread_id LIMIT 1) t",
    "DELETE FROM idempotency_keys AS t
    WHERE {of_key} AND t.key = :idempotency_key AND {forgotten t, :remember};

    SELECT k.request_hash, {thread t}, {run r}
    FROM idempotency_keys k JOIN runs r ON r.id = k.run_id JOIN threads t ON t.id = r.thread_id
    WHERE k.tenant = :tenant AND k.user_key = :user AND k.scope_kind = :scope_kind AND k.scope_name = :scope_name
        AND k.key = :idempotency_key",
);

pub(super) static STATEMENTS: &[&Statement] = &[&FIND_REPEATED];

impl Store {
    /// Returns the earlier use of an idempotency key of the conversation. This call forgets a use
    /// that is older than `remember`. It also forgets a use whose run failed with
    /// [`NotRecorded`](crate::domain::RunErrorCode::NotRecorded): the sender got an error for that
    /// message, so a retry is a new message.
    pub async fn repeated(
        &self,
        key: &ConversationKey,
        idempotency_key: &str,
        remember: Duration,
    ) -> Result<Option<Repeated>, StoreError> {
        let mut c = self.backend.writer().await?;
        let values = params()
            .key(key)
            .set("idempotency_key", idempotency_key)
            .set("remember", millis(remember));
        let row: Option<RepeatedRow> = c.optional(&FIND_REPEATED, values).await?;
        row.map(Repeated::try_from).transpose()
    }
}

/// An earlier use of an idempotency key.
#[derive(Clone, Debug, PartialEq)]
pub struct Repeated {
    pub request_hash: [u8; 32],
    pub thread: Thread,
    pub run: Run,
}

/// The run of an idempotency key, and the hash of its request.
#[derive(FromRow)]
struct RepeatedRow {
    request_hash: Vec<u8>,
    #[sqlx(flatten)]
    both: ThreadAndRun,
}

impl TryFrom<RepeatedRow> for Repeated {
    type Error = StoreError;

    fn try_from(row: RepeatedRow) -> Result<Self, StoreError> {
        let request_hash = row
            .request_hash
            .try_into()
            .map_err(|_| corrupt("the hash of a request, of the wrong length"))?;
        Ok(Self {
            request_hash,
            thread: row.both.thread.try_into()?,
            run: row.both.run.try_into()?,
        })
    }
}
