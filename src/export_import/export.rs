//! Exports threads.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::{Stream, stream};

use super::{Counts, Line};
use crate::domain::{Lifecycle, PageRequest, Reader, Run, TenantKey, Thread, ThreadId, UserKey};
use crate::store::{Store, StoreError, ThreadFilter};

/// Threads of one read.
const THREADS: u32 = 50;
/// Runs or messages of one read. Several threads share a read if they have no more together.
const ROWS: u32 = 500;

/// The extent of an export.
#[derive(Clone, Debug)]
pub enum What {
    /// Everything of a tenant.
    All(TenantKey),
    /// Everything of one user.
    User(TenantKey, UserKey),
}

/// Streams the lines, each with its line feed: threads by id, which is by age, each with its runs
/// and messages, and the end line. It reads the store as the caller asks for lines.
///
/// Threads that are being deleted are left out. So are messages of queued runs, because they are
/// in no transcript yet.
///
/// The export is no snapshot: a change during it may be in it or not.
pub fn export(
    store: Arc<Store>,
    what: What,
    reader: Reader,
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
        reader,
        at: Place::Threads,
        threads: VecDeque::new(),
        cursor: None,
        last: None,
        has_more: true,
        group: VecDeque::new(),
        ids: Vec::new(),
        runs: VecDeque::new(),
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
    store: Arc<Store>,
    filter: ThreadFilter,
    reader: Reader,
    at: Place,
    /// Threads whose lines come after those of the group.
    threads: VecDeque<Thread>,
    /// The cursor of the next page of threads.
    cursor: Option<ThreadId>,
    /// The last thread of all reads so far.
    last: Option<ThreadId>,
    has_more: bool,
    /// The threads whose runs and messages are being read, and that have no line yet.
    group: VecDeque<Thread>,
    /// The ids of all threads of the group.
    ids: Vec<ThreadId>,
    /// Runs of the group, which are written after the lines of their threads.
    runs: VecDeque<Run>,
    lines: VecDeque<String>,
    /// The counts of the lines so far.
    counts: Counts,
}

/// The next read. Within a group: the rows after a number in one of its threads.
#[derive(Clone, Copy, Debug)]
enum Place {
    Threads,
    Runs(ThreadId, i64),
    Messages(ThreadId, i64),
    End,
}

impl Export {
    /// Does one read, and writes its lines.
    async fn read(&mut self) -> Result<(), StoreError> {
        match self.at {
            Place::Threads if !self.threads.is_empty() => {
                self.begin_group();
                Ok(())
            }
            Place::Threads if self.has_more => self.read_threads().await,
            Place::Threads => {
                self.at = Place::End;
                self.write(&Line::End(self.counts))
            }
            Place::Runs(thread, after) => {
                let runs = self.store.runs_of(&self.ids, (thread, after), ROWS).await?;
                self.at = match runs.last() {
                    Some(last) if runs.len() == ROWS as usize => {
                        Place::Runs(last.thread_id, last.seq)
                    }
                    _ => Place::Messages(self.ids[0], 0),
                };
                self.runs.extend(runs);
                // Runs of later threads have to wait for this thread's messages.
                self.write_up_to(self.ids[0])
            }
            Place::Messages(thread, after) => {
                let page = self
                    .store
                    .transcripts(&self.ids, (thread, after), ROWS)
                    .await?;
                self.at = match page.data.last() {
                    Some(last) if page.has_more => Place::Messages(last.thread_id, last.position),
                    _ => Place::Threads,
                };
                for message in page.data {
                    self.write_up_to(message.thread_id)?;
                    self.counts.messages += 1;
                    self.write(&Line::Message(message.seen_by(self.reader).into()))?;
                }
                if page.has_more {
                    Ok(())
                } else {
                    self.write_up_to(self.ids[self.ids.len() - 1])
                }
            }
            Place::End => Ok(()),
        }
    }

    /// Begins a group: threads whose runs together fit into one read, and whose messages do too,
    /// or a single thread.
    fn begin_group(&mut self) {
        let (mut runs, mut messages) = (0, 0);
        self.ids.clear();
        while let Some(thread) = self.threads.front() {
            runs += thread.run_count;
            messages += thread.message_count;
            if !self.ids.is_empty() && runs.max(messages) > i64::from(ROWS) {
                break;
            }
            self.ids.push(thread.id);
            self.group.extend(self.threads.pop_front());
        }
        self.at = match runs {
            // `run_count` includes pruned runs.
            0 => Place::Messages(self.ids[0], 0),
            _ => Place::Runs(self.ids[0], 0),
        };
    }

    /// Writes the lines of the threads up to `last`, each with those of its runs that were read.
    fn write_up_to(&mut self, last: ThreadId) -> Result<(), StoreError> {
        while let Some(thread) = self.group.pop_front_if(|thread| thread.id <= last) {
            let id = thread.id;
            self.counts.threads += 1;
            self.write(&Line::Thread(thread.into()))?;
            self.write_runs(id)?;
        }
        // More runs of a thread whose line is written.
        self.write_runs(last)
    }

    fn write_runs(&mut self, thread: ThreadId) -> Result<(), StoreError> {
        while let Some(run) = self.runs.pop_front_if(|run| run.thread_id == thread) {
            self.counts.runs += 1;
            self.write(&Line::Run(run.into()))?;
        }
        Ok(())
    }

    async fn read_threads(&mut self) -> Result<(), StoreError> {
        let page = PageRequest {
            limit: THREADS,
            ascending: true,
            after: self.cursor,
            before: None,
        };
        let page = match self.store.threads(&self.filter, &page).await {
            // The thread of the cursor was erased meanwhile. Start again, and skip the threads
            // that were read.
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
        self.threads
            .extend(fresh.filter(|thread| thread.lifecycle != Lifecycle::Deleting));
        self.last = self.last.max(self.cursor);
        Ok(())
    }

    fn write(&mut self, line: &Line) -> Result<(), StoreError> {
        let mut text =
            serde_json::to_string(line).map_err(|error| StoreError::Statement(error.into()))?;
        text.push('\n');
        self.lines.push_back(text);
        Ok(())
    }
}
