//! Statistics of the simulator, for tests of invariants.

use std::collections::{BTreeMap, HashMap, VecDeque};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::Instant;

use crate::simulator::wire::fields::Metadata;

/// Violations that are kept as text.
const MAX_VIOLATIONS: usize = 1000;

/// Statistics since the start, or since the last reset.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Stats {
    /// Requests of either protocol, refused ones included.
    pub requests: u64,
    /// Requests by operation, such as `create_run`; `operation.rs` has the names.
    pub requests_by_operation: BTreeMap<String, u64>,
    /// Runs and responses that were accepted.
    pub runs_started: u64,
    /// Ended runs and responses, by final status. A response whose client left counts as
    /// `abandoned`.
    pub runs_ended: BTreeMap<String, u64>,
    /// Runs and responses that have not ended, including those that wait for tool outputs.
    pub active_runs: usize,
    /// The highest number of active runs at one time, over all threads.
    pub max_active_runs: usize,
    /// The highest number of active runs at one time on any thread, conversation or chain of
    /// responses. Counted whether or not locks are enforced.
    pub max_active_runs_per_thread: usize,
    /// The same number without runs that wait for tool outputs.
    pub max_generating_runs_per_thread: usize,
    /// Messages that were added to a thread during an active run (only where locks are not
    /// enforced).
    pub messages_added_while_active: u64,
    /// Requests that were refused because of an active run.
    pub lock_refusals: u64,
    pub threads_created: u64,
    pub threads_deleted: u64,
    pub conversations_created: u64,
    pub conversations_deleted: u64,
    /// Text tokens that were sent or generated.
    pub tokens: u64,
    /// Acts that a careful client never does, in words; at most 1000.
    pub violations: Vec<String>,
}

/// A thread or conversation as clients see it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ThreadView {
    pub id: String,
    pub metadata: BTreeMap<String, String>,
    /// The texts of the user messages, oldest first, directives included.
    pub user_texts: Vec<String>,
    /// The conversation was deleted, but its items still exist.
    pub deleted: bool,
    /// The ids of its runs and responses that have not ended.
    pub active: Vec<String>,
}

/// An accepted run or response, and its course.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RunView {
    pub id: String,
    /// Its thread or conversation; without either, the first response of its chain.
    pub thread: String,
    pub metadata: BTreeMap<String, String>,
    /// The texts of the user messages that were sent with it, oldest first, directives included.
    /// Messages of the history come before those of the run.
    pub user_texts: Vec<String>,
    /// The function calls that were answered, by the request itself or while the run waited.
    pub answered_calls: Vec<String>,
    /// The final status; unset before the end. A response whose client left was `abandoned`, a
    /// run whose thread was deleted `deleted`.
    pub status: Option<String>,
    /// Milliseconds from the start of the simulator, by its monotonic clock.
    pub started_ms: u64,
    pub ended_ms: Option<u64>,
}

/// A request as it arrived.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Recorded {
    pub method: String,
    /// The path from `/v1` on, without the query.
    pub path: String,
    pub query: Option<String>,
    /// Names in lower case. Credentials are left out.
    pub headers: BTreeMap<String, String>,
    /// Null without a body, or for a body above 256 KiB; a string if the body is not JSON.
    pub body: Value,
    /// An operation such as `create_run`; unset for an unknown path.
    pub operation: Option<String>,
}

/// The counters of a running simulator.
#[derive(Debug)]
pub(in crate::simulator) struct Counters {
    pub(in crate::simulator) stats: Stats,
    lanes: HashMap<String, Lane>,
    pub(in crate::simulator) recorded: VecDeque<Recorded>,
    runs: RunLog,
}

/// The newest runs, oldest first.
#[derive(Debug)]
struct RunLog {
    since: Instant,
    keep: usize,
    runs: VecDeque<RunView>,
    /// Number of removed runs, which is the number of the first one in `runs`.
    forgotten: usize,
    /// The numbers of the runs that have not ended.
    open: HashMap<String, usize>,
}

/// The active runs of one thread, conversation or chain.
#[derive(Debug, Default)]
struct Lane {
    active: Vec<String>,
    generating: usize,
}

/// A run or response at its acceptance.
#[derive(Debug)]
pub(in crate::simulator) struct Accepted<'a> {
    pub(in crate::simulator) id: &'a str,
    pub(in crate::simulator) metadata: &'a Metadata,
    pub(in crate::simulator) user_texts: Vec<String>,
    pub(in crate::simulator) answered_calls: Vec<String>,
}

impl Counters {
    /// `since`: the start of the simulator. The newest `keep` runs are kept.
    pub(in crate::simulator) fn new(since: Instant, keep: usize) -> Self {
        let runs = RunLog {
            since,
            keep,
            runs: VecDeque::new(),
            forgotten: 0,
            open: HashMap::new(),
        };
        Self {
            stats: Stats::default(),
            lanes: HashMap::new(),
            recorded: VecDeque::new(),
            runs,
        }
    }

    /// Returns the newest runs and responses, oldest first.
    pub(in crate::simulator) fn runs(&self) -> Vec<RunView> {
        self.runs.runs.iter().cloned().collect()
    }

    pub(in crate::simulator) fn request(&mut self, operation: Option<&str>) {
        self.stats.requests += 1;
        let operation = operation.unwrap_or("unknown");
        if let Some(count) = self.stats.requests_by_operation.get_mut(operation) {
            *count += 1;
        } else {
            self.stats
                .requests_by_operation
                .insert(operation.to_owned(), 1);
        }
    }

    pub(in crate::simulator) fn record(&mut self, request: Recorded, keep: usize) {
        self.recorded.push_back(request);
        while self.recorded.len() > keep {
            self.recorded.pop_front();
        }
    }

    /// Counts a run that was accepted on `lane`.
    pub(in crate::simulator) fn begin(&mut self, lane: &str, accepted: Accepted<'_>) {
        let run = accepted.id;
        let entry = self.lanes.entry(lane.to_owned()).or_default();
        let others = entry.active.join(", ");
        entry.active.push(run.to_owned());
        entry.generating += 1;
        let (active, generating) = (entry.active.len(), entry.generating);
        if active > 1 {
            self.violation(format!("run {run} was started on {lane} beside {others}"));
        }
        let stats = &mut self.stats;
        stats.runs_started += 1;
        stats.active_runs += 1;
        stats.max_active_runs = stats.max_active_runs.max(stats.active_runs);
        stats.max_active_runs_per_thread = stats.max_active_runs_per_thread.max(active);
        stats.max_generating_runs_per_thread = stats.max_generating_runs_per_thread.max(generating);
        self.runs.begin(lane, accepted);
    }

    /// Records answers to the calls of a run that waited for outputs.
    pub(in crate::simulator) fn answered(
        &mut self,
        run: &str,
        calls: impl IntoIterator<Item = String>,
    ) {
        if let Some(view) = self.runs.open_run(run) {
            view.answered_calls.extend(calls);
        }
    }

    /// Counts a run that begins to wait for tool outputs.
    pub(in crate::simulator) fn pause(&mut self, lane: &str) {
        if let Some(entry) = self.lanes.get_mut(lane) {
            entry.generating = entry.generating.saturating_sub(1);
        }
    }

    /// Counts a run that continues after its wait.
    pub(in crate::simulator) fn resume(&mut self, lane: &str) {
        if let Some(entry) = self.lanes.get_mut(lane) {
            entry.generating += 1;
            let most = &mut self.stats.max_generating_runs_per_thread;
            *most = entry.generating.max(*most);
        }
    }

    /// Counts a run that has ended. `generating`: the run did not wait for tool outputs.
    pub(in crate::simulator) fn end(
        &mut self,
        lane: &str,
        run: &str,
        generating: bool,
        status: &str,
    ) {
        if let Some(entry) = self.lanes.get_mut(lane) {
            entry.active.retain(|id| id != run);
            entry.generating -= usize::from(generating && entry.generating > 0);
            if entry.active.is_empty() {
                self.lanes.remove(lane);
            }
        }
        self.stats.active_runs = self.stats.active_runs.saturating_sub(1);
        *self.stats.runs_ended.entry(status.to_owned()).or_default() += 1;
        self.runs.end(run, status);
    }

    pub(in crate::simulator) fn violation(&mut self, text: String) {
        if self.stats.violations.len() < MAX_VIOLATIONS {
            self.stats.violations.push(text);
        }
    }
}

impl RunLog {
    fn begin(&mut self, lane: &str, accepted: Accepted<'_>) {
        let Accepted {
            id,
            metadata,
            user_texts,
            answered_calls,
        } = accepted;
        self.open
            .insert(id.to_owned(), self.forgotten + self.runs.len());
        self.runs.push_back(RunView {
            id: id.to_owned(),
            thread: lane.to_owned(),
            metadata: metadata.clone(),
            user_texts,
            answered_calls,
            status: None,
            started_ms: self.now(),
            ended_ms: None,
        });
        while self.runs.len() > self.keep {
            self.runs.pop_front();
            self.forgotten += 1;
        }
    }

    fn end(&mut self, run: &str, status: &str) {
        let now = self.now();
        if let Some(view) = self.open_run(run) {
            (view.status, view.ended_ms) = (Some(status.to_owned()), Some(now));
        }
        self.open.remove(run);
    }

    /// Returns a run that has not ended, if it is still kept.
    fn open_run(&mut self, run: &str) -> Option<&mut RunView> {
        let number = self.open.get(run)?.checked_sub(self.forgotten)?;
        self.runs.get_mut(number)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A message of a thread, or a message item of a conversation, as role and text.
pub(in crate::simulator) type Line = (String, String);

/// Returns the view of a thread or conversation with these messages.
pub(in crate::simulator) fn view(
    id: &str,
    metadata: &Metadata,
    lines: Vec<Line>,
    active: &[String],
    deleted: bool,
) -> ThreadView {
    let user_texts = lines
        .into_iter()
        .filter(|(role, _)| role == "user")
        .map(|(_, text)| text)
        .collect();
    ThreadView {
        id: id.to_owned(),
        metadata: metadata.clone(),
        user_texts,
        deleted,
        active: active.to_vec(),
    }
}
