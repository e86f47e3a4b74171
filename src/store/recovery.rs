//! The recovery of a run whose request the upstream refused.

use sqlx::types::Json;

use super::params::params;
use super::rows::millis;
use super::statement::Statement;
use super::values::ORPHAN_AFTER;
use super::{Bound, RunLease, Store, StoreError};
use crate::domain::{KnownRefusal, RunRecovery, ThreadId};

/// Records an upstream thread on trial. The janitor deletes it some time after the run's deadline,
/// unless it was bound by then.
static RECORD_TRIAL: Statement = Statement::new(
    "recovery.record_trial",
    "UPDATE upstream_orphans AS o SET upstream_id = :upstream_id, due_at = (
        SELECT {greatest COALESCE(r.deadline_at, {now}), {now}} + {ms :orphan_after} FROM runs r WHERE r.id = :run
    )
    WHERE o.id = :orphan",
);

static RECORD: Statement = Statement::new(
    "recovery.record",
    "UPDATE runs AS r SET recovery = :recovery WHERE {leased r} AND {at_work r}",
);

static RECORD_REFUSAL: Statement = Statement::new(
    "recovery.record_refusal",
    "UPDATE threads AS t SET last_refusal = :refusal
    WHERE t.id = (SELECT r.thread_id FROM runs r WHERE {leased r} AND {at_work r})",
);

static READ_REFUSAL: Statement = Statement::new(
    "recovery.read_refusal",
    "SELECT t.last_refusal FROM threads t WHERE t.id = :thread",
);

static GIVE_TRIAL_UP: Statement = Statement::new(
    "recovery.give_trial_up",
    "UPDATE upstream_orphans AS o SET upstream_id = :upstream_id, due_at = {now} WHERE o.id = :orphan",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &RECORD_TRIAL,
    &RECORD,
    &RECORD_REFUSAL,
    &READ_REFUSAL,
    &GIVE_TRIAL_UP,
];

impl Store {
    /// Records the recovery of a run, and its upstream thread on trial if it has one. The trial's
    /// record as an intent exists. Harmless to repeat.
    pub async fn record_recovery(
        &self,
        lease: &RunLease,
        recovery: &RunRecovery,
    ) -> Result<Bound, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        c.begin().await?;
        let of_run = || {
            params()
                .set("run", lease.run_id.uuid())
                .set("fence", lease.fence)
        };
        let is_ours = c
            .execute(&RECORD, of_run().json("recovery", Some(recovery))?)
            .await?
            == 1;
        let mut is_recorded = true;
        if let Some(trial) = &recovery.trial {
            let of_trial = || {
                params()
                    .set("orphan", trial.orphan.uuid())
                    .set("upstream_id", trial.thread.as_str())
            };
            let changed = if is_ours {
                let values = of_trial()
                    .set("run", lease.run_id.uuid())
                    .set("orphan_after", millis(ORPHAN_AFTER));
                c.execute(&RECORD_TRIAL, values).await?
            } else {
                c.execute(&GIVE_TRIAL_UP, of_trial()).await?
            };
            is_recorded = changed == 1;
        }
        c.commit().await?;
        Ok(match (is_ours, is_recorded) {
            (true, _) => Bound::Done,
            (false, true) => Bound::Lost,
            (false, false) => Bound::Unrecorded,
        })
    }

    /// Remembers a refusal, and how the run recovered from it, for the thread of a run. Returns
    /// `false` if the lease was lost. Harmless to repeat.
    pub async fn record_refusal(
        &self,
        lease: &RunLease,
        refusal: &KnownRefusal,
    ) -> Result<bool, StoreError> {
        let mut c = self.backend.vital_writer().await?;
        let values = params()
            .set("run", lease.run_id.uuid())
            .set("fence", lease.fence)
            .json("refusal", Some(refusal))?;
        Ok(c.execute(&RECORD_REFUSAL, values).await? == 1)
    }

    /// Returns the last remembered refusal of a thread.
    pub async fn last_refusal(&self, thread: ThreadId) -> Result<Option<KnownRefusal>, StoreError> {
        let mut c = self.backend.reader().await?;
        let row: Option<(Option<Json<KnownRefusal>>,)> = c
            .optional(&READ_REFUSAL, params().set("thread", thread.uuid()))
            .await?;
        Ok(row.and_then(|(refusal,)| refusal).map(|json| json.0))
    }
}
