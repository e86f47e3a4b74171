//! Taking out.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::{Stream, stream};

use super::{Counts, Line};
use crate::domain::{Lifecycle, PageRequest, TenantKey, Thread, ThreadId, UserKey};
use crate::store::{Store, StoreError, ThreadFilter};

/// Rows in one read, at most: no more are held in memory at a time.
const PAGE: u32 = 50;

/// What is taken out.
#[derive(Clone, Debug)]
pub enum What {
    /// All of a tenant.
    All(TenantKey),
    /// All of one user.
    User(TenantKey, UserKey),
}

/// The lines, each with its line feed, read as they are asked for: threads by id, which is by age, each with its runs and
/// its messages, and the end. Left out are threads that are being deleted, and messages of runs that still wait for their
/// turn: these are in no transcript yet.
///
/// It is no snapshot: what happens meanwhile is in it or not.
pub fn export(
    store: Arc<dyn Store>,
    what: What,
) -> impl Stream<Item = Result<String, StoreError>> + Send + 'static {
    let (tenant, user) = match what {
        What::All(tenant) => (tenant, None),
        What::User(tenant, user) => (tenant, Some(user)),
    };
    let filter = ThreadFilter {
        tenant,
        user,
        upstream: None,
        lifecycle: None,
        state: None,
        created_before: None,
        inactive_since: None,
    };
    let export = Export {
        store,
        filter,
        at: Place::Threads,
        threads: VecDeque::new(),
        cursor: None,
        last: None,
        has_more: true,
        lines: VecDeque::new(),
        counts: Counts::default(),
    };
    stream::try_unfold(export, |mut export| async move {
        loop {
            if let Some(line) = export.lines.pop_front() {
                return Ok(Some((line, export)));
            }
            if matches!(export.at, Place::End) {
                return Ok(None);
            }
            export.read().await?;
        }
    })
}

struct Export {
    store: Arc<dyn Store>,
    filter: ThreadFilter,
    at: Place,
    /// Read, and to be written after the one that is being read.
    threads: VecDeque<Thread>,
    /// Where the next page of threads begins.
    cursor: Option<ThreadId>,
    /// The last thread that was read, ever.
    last: Option<ThreadId>,
    has_more: bool,
    lines: VecDeque<String>,
    /// Of the lines so far.
    counts: Counts,
}

/// What is read next; of a thread, what comes after a number.
#[derive(Clone, Copy, Debug)]
enum Place {
    Threads,
    Runs(ThreadId, i64),
    Messages(ThreadId, i64),
    End,
}

impl Export {
    /// One read, and its lines if there are any.
    async fn read(&mut self) -> Result<(), StoreError> {
        match self.at {
            Place::Threads => match self.threads.pop_front() {
                Some(thread) => {
                    self.at = Place::Runs(thread.id, 0);
                    self.counts.threads += 1;
                    self.write(&Line::Thread(thread.into()))
                }
                None if self.has_more => self.read_threads().await,
                None => {
                    self.at = Place::End;
                    self.write(&Line::End(self.counts))
                }
            },
            Place::Runs(thread, after) => {
                let runs = self.store.runs_of(thread, after, PAGE).await?;
                self.at = match runs.last() {
                    Some(last) if runs.len() == PAGE as usize => Place::Runs(thread, last.seq),
                    _ => Place::Messages(thread, 0),
                };
                self.counts.runs += runs.len() as u64;
                runs.into_iter().try_for_each(|run| self.write(&Line::Run(run.into())))
            }
            Place::Messages(thread, after) => {
                let messages = self.store.transcript(thread, after, PAGE).await?;
                // Fewer may have come than there are: long ones.
                self.at = match messages.last() {
                    Some(last) => Place::Messages(thread, last.position),
                    None => Place::Threads,
                };
                self.counts.messages += messages.len() as u64;
                messages.into_iter().try_for_each(|message| self.write(&Line::Message(message.into())))
            }
            Place::End => Ok(()),
        }
    }

    async fn read_threads(&mut self) -> Result<(), StoreError> {
        let page = PageRequest { limit: PAGE, ascending: true, after: self.cursor, before: None };
        let page = match self.store.threads(&self.filter, &page).await {
            // The one that the page begins after was erased meanwhile: from the beginning, past what was read.
            Err(StoreError::UnknownCursor) if self.cursor.is_some() => {
                self.cursor = None;
                return Ok(());
            }
            page => page?,
        };
        self.has_more = page.has_more;
        self.cursor = page.data.last().map(|(thread, _)| thread.id);
        let (last, fresh) = (self.last, page.data.into_iter().map(|(thread, _)| thread));
        let fresh = fresh.filter(|thread| last.is_none_or(|last| thread.id > last));
        self.threads.extend(fresh.filter(|thread| thread.lifecycle != Lifecycle::Deleting));
        self.last = self.last.max(self.cursor);
        Ok(())
    }

    fn write(&mut self, line: &Line) -> Result<(), StoreError> {
        let mut text = serde_json::to_string(line).map_err(|error| StoreError::Statement(error.into()))?;
        text.push('\n');
        self.lines.push_back(text);
        Ok(())
    }
}
