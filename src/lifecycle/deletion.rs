//! What callers ask for: the deletion of a conversation, or of all that a user has.

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

/// Threads with which a deletion begins at a time.
const BEGIN_BATCH: u32 = 500;
/// Threads of a deletion that the request itself sees to; the janitor does the rest.
const AT_ONCE: u32 = 100;
/// How long it has them to itself. What is not done by then is the janitor's, too.
const HOLD: Duration = Duration::from_mins(1);
/// How often the request looks whether the janitor is done.
const POLL: Duration = Duration::from_millis(200);

const NO_DELETION: Error =
    Error::NotFound("there is no such deletion, or its receipt is past its time");

/// What is to be deleted.
#[derive(Clone, Debug)]
pub enum Target {
    /// A conversation: its thread, and all that came before it; to archive: its current thread alone.
    Conversation(ConversationKey),
    /// All that a user has; to archive: the current threads.
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
    /// Deletes, here and upstream, and waits for the end within a bound; what is not done by then goes on in the
    /// background, whatever becomes of the caller or this process. Asked again meanwhile, it tells of the same deletion.
    ///
    /// A message that arrives from then on starts a fresh thread.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such conversation. A user who has none is deleted all the same.
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
            // More than that is for the janitors of all replicas.
            request.hold = Duration::ZERO;
            if begun == u64::from(AT_ONCE) {
                while self.store().begin_deletion(&request, BEGIN_BATCH).await? > 0 {}
                self.ctx.wake.notify_one();
            }
        }
        if begun == 0 {
            // An earlier request has begun with all of it, or there is nothing.
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
            // It goes on, so this must not look as if it did not.
            Err(error) if begun > 0 => {
                tracing::warn!(error = %Chain(&error), "cannot read what came of a deletion yet");
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

    /// What [`delete_all`](Self::delete_all) would take. Nothing is changed.
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

    /// What came of a request to delete.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such request, or its receipt is past its time.
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

    /// The same for whoever asks: a user is told of what is deleted of theirs, before it is done and afterwards.
    ///
    /// # Errors
    /// [`Error::NotFound`] also if it is another user's.
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
        // Requests that an earlier version recorded have a name alone, until they are done.
        let is_theirs = report.fingerprint == Some(own) || report.user.as_ref() == Some(user);
        if is_theirs {
            Ok(report)
        } else {
            Err(NO_DELETION)
        }
    }

    /// Works on the first threads of a deletion at once, so that a caller need not wait for the janitor's turn.
    async fn see_to(&self, tenant: &TenantKey, id: DeletionId) {
        if timeout(HOLD, self.see_to_all(tenant, id)).await.is_err() {
            tracing::info!("the deletion goes on in the background");
        }
    }

    async fn see_to_all(&self, tenant: &TenantKey, id: DeletionId) {
        let pending = match self.store().deletion(tenant, id, None, AT_ONCE).await {
            Ok(report) => report.map(|report| report.threads.data).unwrap_or_default(),
            Err(error) => {
                return tracing::warn!(error = %Chain(&error), "cannot read what is to be deleted");
            }
        };
        let counts = Counts::default();
        for thread in pending.iter().filter(|thread| thread.finished_at.is_none()) {
            match self.store().thread(thread.id).await {
                Ok(Some(now)) => {
                    // The time is of no matter: what is being deleted is not judged by it.
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
                    tracing::warn!(error = %Chain(&error), "cannot read a thread that is to be deleted");
                }
            }
        }
    }
}

const NOTHING: Error =
    Error::NotFound("this key has no conversation, and none of it is being deleted");
