//! Requests of callers: to delete a conversation, or everything of a user.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tracing::Instrument;

use super::Janitor;
use super::janitor::Counts;
use crate::domain::{
    ConversationKey, Deletion, DeletionId, Page, Principal, TenantKey, ThreadId, UserKey, now,
};
use crate::error::{Chain, Error};
use crate::store::{
    Deletable, DeletionReport, DeletionRequest, DeletionTarget, DueThread, ThreadName,
};

/// Threads that one statement marks for deletion.
const BEGIN_BATCH: u32 = 500;
/// Threads of a deletion that the request itself deletes; the janitor deletes the rest.
const AT_ONCE: u32 = 100;
/// Time for which the request has these threads to itself. After it the janitor may take them
/// too.
const HOLD: Duration = Duration::from_mins(1);
/// Pause between two checks of the request whether the deletion has finished.
const POLL: Duration = Duration::from_millis(200);

const NO_DELETION: Error =
    Error::NotFound("there is no such deletion, or its receipt has been pruned");

/// The target of a deletion.
#[derive(Clone, Debug)]
pub enum Target {
    /// A conversation: its current thread and all earlier ones. To archive: its current thread
    /// alone.
    Conversation(ConversationKey),
    /// Everything of a user. To archive: the current threads.
    User(TenantKey, UserKey),
}

impl Target {
    fn parts(self) -> (TenantKey, DeletionTarget) {
        match self {
            Self::Conversation(key) => (key.tenant.clone(), DeletionTarget::Key(key)),
            Self::User(tenant, user) => (tenant, DeletionTarget::User(user)),
        }
    }
}

impl Janitor {
    /// Deletes the target, here and upstream, and waits for the end within a bound. Unfinished
    /// work continues in the background, even if the caller leaves or this process stops. A
    /// repeated request returns the report of the same deletion.
    ///
    /// A message that arrives after the request starts a fresh thread.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such conversation. A user without conversations is no
    /// error.
    pub async fn delete_all(
        &self,
        target: Target,
        end: Deletion,
        patience: Option<Duration>,
    ) -> Result<DeletionReport, Error> {
        let patience = patience.unwrap_or(self.ctx.parts.patience);
        let (tenant, target) = target.parts();
        let key = match &target {
            DeletionTarget::Key(key) => Some(key.clone()),
            DeletionTarget::User(_) => None,
        };
        let exists = match &key {
            Some(key) => self
                .store()
                .report(ThreadName::Newest(key))
                .await?
                .is_some(),
            None => true,
        };
        let mut id = DeletionId::new();
        let requested_at = now();
        let mut begun = 0;
        if exists {
            let fingerprint = self.ctx.parts.fingerprints.user(&tenant, target.user());
            let mut request = DeletionRequest {
                id,
                tenant: tenant.clone(),
                target: target.clone(),
                fingerprint,
                end,
                hold: HOLD,
            };
            begun = self.store().begin_deletion(&request, AT_ONCE).await?;
            if begun > 0 {
                let (janitor, of) = (self.clone(), tenant.clone());
                self.ctx
                    .parts
                    .tasks
                    .spawn(async move { janitor.see_to(&of, id).await }.in_current_span());
            }
            // The janitors of all replicas delete the others.
            request.hold = Duration::ZERO;
            if begun == u64::from(AT_ONCE) {
                while self.store().begin_deletion(&request, BEGIN_BATCH).await? > 0 {}
                self.ctx.wake.notify_one();
            }
        }
        if begun == 0 {
            // An earlier request deletes everything already, or there is nothing to delete.
            match self.store().deletion_under_way(&tenant, &target).await? {
                Some(earlier) => id = earlier,
                None if key.is_some() => return Err(NOTHING),
                None => {}
            }
        }
        let finished = async {
            loop {
                let report = self.report(&tenant, id, None, AT_ONCE).await?;
                if report.finished_at.is_some() {
                    return Ok(report);
                }
                sleep(POLL).await;
            }
        };
        let report = match timeout(patience, finished).await {
            Ok(report) => report,
            Err(_) => self.report(&tenant, id, None, AT_ONCE).await,
        };
        match report {
            // The deletion continues, so the answer must not look like a failure.
            Err(error) if begun > 0 => {
                tracing::warn!(error = %Chain(&error), "cannot read the report of a deletion that continues");
                let threads = Page {
                    data: Vec::new(),
                    has_more: true,
                };
                let (archive, pending) = (
                    end == Deletion::Archive,
                    i64::try_from(begun).unwrap_or(i64::MAX),
                );
                Ok(DeletionReport {
                    id,
                    user: None,
                    fingerprint: None,
                    requested_at,
                    finished_at: None,
                    archive,
                    done: 0,
                    pending,
                    incomplete: 0,
                    threads,
                })
            }
            report => report,
        }
    }

    /// Counts what [`delete_all`](Self::delete_all) would delete. Changes nothing.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such conversation.
    pub async fn deletable(&self, target: Target, end: Deletion) -> Result<Deletable, Error> {
        let (tenant, target) = target.parts();
        let found = self.store().deletable(&tenant, &target, end).await?;
        match target {
            DeletionTarget::Key(_) if found.threads == 0 => Err(NOTHING),
            _ => Ok(found),
        }
    }

    /// Returns the report of a deletion.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such deletion, or its receipt has been pruned.
    pub async fn report(
        &self,
        tenant: &TenantKey,
        id: DeletionId,
        after: Option<ThreadId>,
        limit: u32,
    ) -> Result<DeletionReport, Error> {
        let report = self.store().deletion(tenant, id, after, limit).await?;
        report.ok_or(NO_DELETION)
    }

    /// Returns the report of a deletion to a caller. A user sees the reports about their own
    /// data, before and after the deletion.
    ///
    /// # Errors
    /// [`Error::NotFound`] also if the deletion concerns another user.
    pub async fn report_to(
        &self,
        caller: &Principal,
        id: DeletionId,
        after: Option<ThreadId>,
        limit: u32,
    ) -> Result<DeletionReport, Error> {
        let report = self.report(&caller.tenant, id, after, limit).await?;
        let Some(user) = &caller.user else {
            return Ok(report);
        };
        let own = self.ctx.parts.fingerprints.user(&caller.tenant, user);
        // Requests that an earlier version recorded hold only the user's name until they are
        // done.
        let is_theirs = report.fingerprint == Some(own) || report.user.as_ref() == Some(user);
        if is_theirs {
            Ok(report)
        } else {
            Err(NO_DELETION)
        }
    }

    /// Works on the first threads of a deletion at once, so that a caller need not wait for the
    /// janitor's next pass.
    async fn see_to(&self, tenant: &TenantKey, id: DeletionId) {
        if timeout(HOLD, self.see_to_all(tenant, id)).await.is_err() {
            tracing::info!("the deletion continues in the background");
        }
    }

    async fn see_to_all(&self, tenant: &TenantKey, id: DeletionId) {
        let pending = match self.store().deletion(tenant, id, None, AT_ONCE).await {
            Ok(report) => report.map(|report| report.threads.data).unwrap_or_default(),
            Err(error) => {
                return tracing::warn!(error = %Chain(&error), "cannot read the threads of a deletion");
            }
        };
        let counts = Counts::default();
        for thread in pending.iter().filter(|thread| thread.finished_at.is_none()) {
            match self.store().thread(thread.id).await {
                Ok(Some(now)) => {
                    // The time does not matter, because expiry is not checked during a deletion.
                    let (attempts, claimed) = (thread.attempts, None);
                    let due = DueThread {
                        now: now.last_active_at,
                        thread: now,
                        attempts,
                        claimed,
                    };
                    tokio::select! {
                        () = self.ctx.parts.draining.cancelled() => return,
                        () = self.process(due, &counts) => {}
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "cannot read a thread of a deletion");
                }
            }
        }
    }
}

const NOTHING: Error =
    Error::NotFound("this key has no conversation, and no deletion of one is under way");
