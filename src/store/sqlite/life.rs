//! The store's other half: which statement serves which method.

use std::time::Duration;

use async_trait::async_trait;

use super::{SqliteStore, deletion, keeping, remnants, rollover, threads};
use crate::domain::{
    ConversationKey, Deletion, DeletionId, Lifetimes, Limits, Message, Page, PageRequest, RemnantId, Removed,
    Run, TenantKey, Thread, ThreadActivity, ThreadId, Timestamp,
};
use crate::store::pool::on;
use crate::store::{
    Deletable, DeletionReport, DeletionRequest, DeletionTarget, Due, Foreign, Imported, ImportedMessage,
    ImportedThread, Life, Made, Pruned, Pruning, Remnant, RemnantName, Rolled, Rollover, RunLease,
    StoreError, ThreadFilter, ThreadName, ThreadReport, ThreadUpdate,
};

#[async_trait]
impl Life for SqliteStore {
    async fn report(&self, name: ThreadName<'_>) -> Result<Option<ThreadReport>, StoreError> {
        on!(self.readers, c => threads::report(c, name))
    }

    async fn thread(&self, id: ThreadId) -> Result<Option<Thread>, StoreError> {
        on!(self.readers, c => threads::thread(c, id))
    }

    async fn threads(
        &self,
        filter: &ThreadFilter,
        page: &PageRequest<ThreadId>,
    ) -> Result<Page<(Thread, ThreadActivity)>, StoreError> {
        on!(self.readers, c => threads::threads(c, filter, page))
    }

    async fn runs_of(&self, thread: ThreadId, after: i64, limit: u32) -> Result<Vec<Run>, StoreError> {
        on!(self.readers, c => threads::runs_of(c, thread, after, limit))
    }

    async fn unfinished_of(&self, thread: ThreadId) -> Result<Vec<Run>, StoreError> {
        on!(self.readers, c => threads::unfinished_of(c, thread))
    }

    async fn update_thread(
        &self,
        key: &ConversationKey,
        update: &ThreadUpdate,
    ) -> Result<Option<Thread>, StoreError> {
        on!(self.writer, c => threads::update_thread(c, key, update))
    }

    async fn import_thread(&self, thread: &ImportedThread) -> Result<Imported, StoreError> {
        on!(self.writer, c => threads::import_thread(c, thread))
    }

    async fn import_messages(
        &self,
        thread: ThreadId,
        messages: &[ImportedMessage],
    ) -> Result<u64, StoreError> {
        on!(self.writer, c => threads::import_messages(c, thread, messages))
    }

    async fn due(&self, limit: u32) -> Result<Vec<Due>, StoreError> {
        on!(self.readers, c => keeping::due(c, limit))
    }

    async fn claim_due(&self, limit: u32, lease: Duration) -> Result<Vec<Due>, StoreError> {
        on!(self.writer, c => keeping::claim_due(c, limit, lease))
    }

    async fn schedule(
        &self,
        thread: ThreadId,
        claimed: Option<Timestamp>,
        after: Option<Duration>,
        failure: Option<&str>,
    ) -> Result<(), StoreError> {
        on!(self.writer, c => keeping::schedule(c, thread, claimed, after, failure))
    }

    async fn review(
        &self,
        after: Option<ThreadId>,
        limit: u32,
        lifetimes: &Lifetimes,
    ) -> Result<Option<ThreadId>, StoreError> {
        on!(self.writer, c => keeping::review(c, after, limit, lifetimes))
    }

    async fn expire(&self, thread: ThreadId, limits: Limits) -> Result<bool, StoreError> {
        on!(self.writer, c => keeping::expire(c, thread, limits))
    }

    async fn discard(&self, thread: ThreadId, keep: Duration) -> Result<bool, StoreError> {
        on!(self.writer, c => keeping::discard(c, thread, keep))
    }

    async fn begin_deletion(&self, request: &DeletionRequest, limit: u32) -> Result<u64, StoreError> {
        on!(self.writer, c => deletion::begin_deletion(c, request, limit))
    }

    async fn deletable(
        &self,
        tenant: &TenantKey,
        target: &DeletionTarget,
        end: Deletion,
    ) -> Result<Deletable, StoreError> {
        on!(self.readers, c => deletion::deletable(c, tenant, target, end))
    }

    async fn deletion(
        &self,
        tenant: &TenantKey,
        id: DeletionId,
        after: Option<ThreadId>,
        limit: u32,
    ) -> Result<Option<DeletionReport>, StoreError> {
        on!(self.readers, c => deletion::deletion(c, tenant, id, after, limit))
    }

    async fn deletion_under_way(
        &self,
        tenant: &TenantKey,
        target: &DeletionTarget,
    ) -> Result<Option<DeletionId>, StoreError> {
        on!(self.readers, c => deletion::deletion_under_way(c, tenant, target))
    }

    async fn remnants(
        &self,
        thread: ThreadId,
        with_runs: bool,
        limit: u32,
    ) -> Result<Vec<Remnant>, StoreError> {
        on!(self.readers, c => remnants::remnants(c, thread, with_runs, limit))
    }

    async fn removed(
        &self,
        thread: ThreadId,
        removed: &Removed,
        forget: &[RemnantName],
    ) -> Result<(), StoreError> {
        on!(self.writer, c => deletion::removed(c, thread, removed, forget))
    }

    async fn conclude(&self, thread: ThreadId, limit: u32) -> Result<bool, StoreError> {
        on!(self.writer, c => deletion::conclude(c, thread, limit))
    }

    async fn intend(&self, lease: &RunLease, intent: RemnantId) -> Result<bool, StoreError> {
        on!(self.writer, c => remnants::intend(c, lease, intent))
    }

    async fn makes_upstream_thread(&self, thread: ThreadId) -> Result<bool, StoreError> {
        on!(self.readers, c => remnants::makes_upstream_thread(c, thread))
    }

    async fn resolve(&self, intent: RemnantId, made: Made<'_>) -> Result<(), StoreError> {
        on!(self.writer, c => remnants::resolve(c, intent, made))
    }

    async fn claim_remnants(&self, limit: u32, lease: Duration) -> Result<Vec<Remnant>, StoreError> {
        on!(self.writer, c => remnants::claim_remnants(c, limit, lease))
    }

    async fn due_remnants(&self, limit: u32) -> Result<Vec<Remnant>, StoreError> {
        on!(self.readers, c => remnants::due_remnants(c, limit))
    }

    async fn schedule_remnant(
        &self,
        id: RemnantId,
        knew: Option<&str>,
        after: Option<Duration>,
    ) -> Result<(), StoreError> {
        on!(self.writer, c => remnants::schedule_remnant(c, id, knew, after))
    }

    async fn keep_remnant(&self, id: RemnantId, knew: Option<&str>) -> Result<(), StoreError> {
        on!(self.writer, c => remnants::keep_remnant(c, id, knew))
    }

    async fn unheard_runs(&self, thread: ThreadId) -> Result<u64, StoreError> {
        on!(self.readers, c => remnants::unheard_runs(c, thread))
    }

    async fn roll_over(&self, rollover: &Rollover) -> Result<Rolled, StoreError> {
        on!(self.writer, c => rollover::roll_over(c, rollover))
    }

    async fn carried(
        &self,
        thread: ThreadId,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        on!(self.readers, c => rollover::carried(c, thread, before, limit))
    }

    async fn insert_foreign(
        &self,
        thread: ThreadId,
        by: Option<RunLease>,
        messages: &[Foreign],
    ) -> Result<u64, StoreError> {
        on!(self.writer, c => rollover::insert_foreign(c, thread, by, messages))
    }

    async fn prune(&self, pruning: &Pruning, limit: u32) -> Result<Pruned, StoreError> {
        on!(self.writer, c => keeping::prune(c, pruning, limit))
    }

    async fn prunable(&self, pruning: &Pruning, limit: u32) -> Result<Pruned, StoreError> {
        on!(self.readers, c => keeping::prunable(c, pruning, limit))
    }
}
