//! The half of the store that is about threads as a whole, and keys: little of it is about content.

use std::time::Duration;

use async_trait::async_trait;

use super::Discreet;
use super::blank::lasting;
use crate::domain::{
    ConversationKey, Deletion, DeletionId, Lifetimes, Limits, Message, Page, PageRequest, RemnantId, Removed,
    Run, TenantKey, Thread, ThreadActivity, ThreadId, Timestamp,
};
use crate::store::{
    Deletable, DeletionReport, DeletionRequest, DeletionTarget, Due, Foreign, Imported, ImportedMessage,
    ImportedThread, Keys, Life, Made, NewKey, Pruned, Pruning, Remnant, RemnantName, Rolled, Rollover,
    RunLease, StoreError, StoredKey, ThreadFilter, ThreadName, ThreadReport, ThreadUpdate,
};

#[async_trait]
impl Keys for Discreet {
    async fn add_key(&self, key: &NewKey) -> Result<(), StoreError> {
        self.inner.add_key(key).await
    }

    async fn keys(&self, tenant: Option<&TenantKey>) -> Result<Vec<StoredKey>, StoreError> {
        self.inner.keys(tenant).await
    }

    async fn good_keys(&self) -> Result<Vec<NewKey>, StoreError> {
        self.inner.good_keys().await
    }

    async fn revoke_key(&self, prefix: &str) -> Result<Option<StoredKey>, StoreError> {
        self.inner.revoke_key(prefix).await
    }

    async fn fingerprint_key(&self, fresh: [u8; 32]) -> Result<[u8; 32], StoreError> {
        self.inner.fingerprint_key(fresh).await
    }
}

#[async_trait]
impl Life for Discreet {
    async fn report(&self, name: ThreadName<'_>) -> Result<Option<ThreadReport>, StoreError> {
        let mut report = self.inner.report(name).await?;
        if let Some(ThreadReport { last_run: Some(run), .. }) = &mut report {
            self.give_arguments(run);
        }
        Ok(report)
    }

    async fn thread(&self, id: ThreadId) -> Result<Option<Thread>, StoreError> {
        self.inner.thread(id).await
    }

    async fn threads(
        &self,
        filter: &ThreadFilter,
        page: &PageRequest<ThreadId>,
    ) -> Result<Page<(Thread, ThreadActivity)>, StoreError> {
        self.inner.threads(filter, page).await
    }

    async fn runs_of(&self, thread: ThreadId, after: i64, limit: u32) -> Result<Vec<Run>, StoreError> {
        let mut runs = self.inner.runs_of(thread, after, limit).await?;
        self.give_all_arguments(&mut runs);
        Ok(runs)
    }

    async fn unfinished_of(&self, thread: ThreadId) -> Result<Vec<Run>, StoreError> {
        let mut runs = self.inner.unfinished_of(thread).await?;
        self.give_all_arguments(&mut runs);
        Ok(runs)
    }

    async fn update_thread(
        &self,
        key: &ConversationKey,
        update: &ThreadUpdate,
    ) -> Result<Option<Thread>, StoreError> {
        self.inner.update_thread(key, update).await
    }

    async fn import_thread(&self, thread: &ImportedThread) -> Result<Imported, StoreError> {
        self.inner.import_thread(thread).await
    }

    async fn import_messages(
        &self,
        thread: ThreadId,
        messages: &[ImportedMessage],
    ) -> Result<u64, StoreError> {
        let blank = |message: &ImportedMessage| {
            let ImportedMessage { id, role, content: _, upstream_message_id, context, created_at } = message;
            ImportedMessage {
                id: *id,
                role: *role,
                content: Vec::new(),
                upstream_message_id: upstream_message_id.clone(),
                context: context.map(lasting),
                created_at: *created_at,
            }
        };
        let messages: Vec<ImportedMessage> = messages.iter().map(blank).collect();
        self.inner.import_messages(thread, &messages).await
    }

    async fn due(&self, limit: u32) -> Result<Vec<Due>, StoreError> {
        self.inner.due(limit).await
    }

    async fn claim_due(&self, limit: u32, lease: Duration) -> Result<Vec<Due>, StoreError> {
        self.inner.claim_due(limit, lease).await
    }

    async fn schedule(
        &self,
        thread: ThreadId,
        claimed: Option<Timestamp>,
        after: Option<Duration>,
        failure: Option<&str>,
    ) -> Result<(), StoreError> {
        self.inner.schedule(thread, claimed, after, failure).await
    }

    async fn review(
        &self,
        after: Option<ThreadId>,
        limit: u32,
        lifetimes: &Lifetimes,
    ) -> Result<Option<ThreadId>, StoreError> {
        self.inner.review(after, limit, lifetimes).await
    }

    async fn expire(&self, thread: ThreadId, limits: Limits) -> Result<bool, StoreError> {
        self.inner.expire(thread, limits).await
    }

    async fn discard(&self, thread: ThreadId, keep: Duration) -> Result<bool, StoreError> {
        self.inner.discard(thread, keep).await
    }

    async fn begin_deletion(&self, request: &DeletionRequest, limit: u32) -> Result<u64, StoreError> {
        self.inner.begin_deletion(request, limit).await
    }

    async fn deletable(
        &self,
        tenant: &TenantKey,
        target: &DeletionTarget,
        end: Deletion,
    ) -> Result<Deletable, StoreError> {
        self.inner.deletable(tenant, target, end).await
    }

    async fn deletion(
        &self,
        tenant: &TenantKey,
        id: DeletionId,
        after: Option<ThreadId>,
        limit: u32,
    ) -> Result<Option<DeletionReport>, StoreError> {
        self.inner.deletion(tenant, id, after, limit).await
    }

    async fn deletion_under_way(
        &self,
        tenant: &TenantKey,
        target: &DeletionTarget,
    ) -> Result<Option<DeletionId>, StoreError> {
        self.inner.deletion_under_way(tenant, target).await
    }

    async fn remnants(
        &self,
        thread: ThreadId,
        with_runs: bool,
        limit: u32,
    ) -> Result<Vec<Remnant>, StoreError> {
        self.inner.remnants(thread, with_runs, limit).await
    }

    async fn removed(
        &self,
        thread: ThreadId,
        removed: &Removed,
        forget: &[RemnantName],
    ) -> Result<(), StoreError> {
        self.inner.removed(thread, removed, forget).await
    }

    async fn conclude(&self, thread: ThreadId, limit: u32) -> Result<bool, StoreError> {
        self.inner.conclude(thread, limit).await
    }

    async fn intend(&self, lease: &RunLease, intent: RemnantId) -> Result<bool, StoreError> {
        Ok(self.if_held(lease, self.inner.intend(lease, intent).await?))
    }

    async fn makes_upstream_thread(&self, thread: ThreadId) -> Result<bool, StoreError> {
        self.inner.makes_upstream_thread(thread).await
    }

    async fn resolve(&self, intent: RemnantId, made: Made<'_>) -> Result<(), StoreError> {
        self.inner.resolve(intent, made).await
    }

    async fn claim_remnants(&self, limit: u32, lease: Duration) -> Result<Vec<Remnant>, StoreError> {
        self.inner.claim_remnants(limit, lease).await
    }

    async fn due_remnants(&self, limit: u32) -> Result<Vec<Remnant>, StoreError> {
        self.inner.due_remnants(limit).await
    }

    async fn schedule_remnant(
        &self,
        id: RemnantId,
        knew: Option<&str>,
        after: Option<Duration>,
    ) -> Result<(), StoreError> {
        self.inner.schedule_remnant(id, knew, after).await
    }

    async fn keep_remnant(&self, id: RemnantId, knew: Option<&str>) -> Result<(), StoreError> {
        self.inner.keep_remnant(id, knew).await
    }

    async fn unheard_runs(&self, thread: ThreadId) -> Result<u64, StoreError> {
        self.inner.unheard_runs(thread).await
    }

    /// Nothing can be carried over.
    async fn roll_over(&self, rollover: &Rollover) -> Result<Rolled, StoreError> {
        let mut rolled = self.inner.roll_over(&Rollover { carry_over: 0, ..*rollover }).await?;
        if let Rolled::Done { turn: Some(turn), .. } = &mut rolled {
            self.give_input(turn);
        }
        Ok(rolled)
    }

    async fn carried(
        &self,
        _thread: ThreadId,
        _before: Option<i64>,
        _limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        Ok(Page { data: Vec::new(), has_more: false })
    }

    async fn insert_foreign(
        &self,
        thread: ThreadId,
        by: Option<RunLease>,
        messages: &[Foreign],
    ) -> Result<u64, StoreError> {
        let blank = |message: &Foreign| {
            let Foreign { id, after, role, content: _, upstream_message_id, created_at } = message;
            Foreign {
                id: *id,
                after: *after,
                role: *role,
                content: Vec::new(),
                upstream_message_id: upstream_message_id.clone(),
                created_at: *created_at,
            }
        };
        let messages: Vec<Foreign> = messages.iter().map(blank).collect();
        self.inner.insert_foreign(thread, by, &messages).await
    }

    async fn prune(&self, pruning: &Pruning, limit: u32) -> Result<Pruned, StoreError> {
        self.inner.prune(pruning, limit).await
    }

    async fn prunable(&self, pruning: &Pruning, limit: u32) -> Result<Pruned, StoreError> {
        self.inner.prunable(pruning, limit).await
    }
}
