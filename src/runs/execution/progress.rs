//! The progress of an active run.

use super::history::count_users;
use super::ladder::Ladder;
use crate::domain::{
    ContentPart, Message, OrphanId, ReplyText, Rerun, RunRecovery, Thread, ToolCall, ToolOutput,
    UpstreamRunId, UpstreamThreadId, Usage, append_messages,
};
use crate::runs::log::stored::StoredLog;
use crate::store::StartedRun;
use crate::upstream::Ended;

/// How far a run has come on its way to the upstream.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(in crate::runs) enum Delivery {
    /// The upstream has nothing of the run.
    #[default]
    NotSent,
    /// The upstream has a request of the run, or may have it.
    Sent,
    /// The upstream has accepted the run.
    Accepted,
}

/// The stored progress of a run of another process, besides the run itself.
#[derive(Clone, Debug, Default)]
pub(in crate::runs) struct StoredProgress {
    pub(in crate::runs) log: StoredLog,
    /// The unsynced messages of its thread. If the run was sent, these were sent with it.
    pub(in crate::runs) unsynced: Vec<Message>,
}

/// The progress of an active run. It survives when the run is cut off.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(in crate::runs) struct Progress {
    pub(in crate::runs) thread: Option<UpstreamThreadId>,
    /// The newest id of the run at the upstream. Each round of a chain of responses has its own.
    pub(in crate::runs) upstream_run: Option<UpstreamRunId>,
    pub(in crate::runs) delivery: Delivery,
    /// The id of a recorded intent to create an upstream thread, while no task carries it out.
    pub(in crate::runs) intent: Option<OrphanId>,
    /// How the run recovers from a refusal.
    pub(in crate::runs) recovery: Option<RunRecovery>,
    /// Whether the upstream has answered in the thread of `recovery`, so that it stands. It may not
    /// be recorded yet.
    pub(in crate::runs) has_answer: bool,
    /// The refusals of the run's message.
    pub(in crate::runs) ladder: Ladder,
    /// Number of requests that may be at the upstream under ids that it did not send.
    pub(in crate::runs) unacknowledged_requests: u32,
    /// Calls that may not be answered yet.
    pub(in crate::runs) open_calls: Vec<ToolCall>,
    /// Content of the rounds before this one.
    pub(in crate::runs) content: Vec<ContentPart>,
    /// Length of `content` before the last round that added to it.
    pub(in crate::runs) rounds_before: usize,
    /// Text of this round so far.
    pub(in crate::runs) text: ReplyText,
    pub(in crate::runs) usage: Option<Usage>,
    /// Tokens of the last round, input and output.
    pub(in crate::runs) context_tokens: Option<u64>,
    /// Whether unsynced messages were sent with the run.
    pub(in crate::runs) synced: bool,
    /// Number of user messages among these.
    pub(in crate::runs) history_users: u32,
    pub(in crate::runs) inputs: u32,
    pub(in crate::runs) cost: usize,
    /// Whether the upstream reported that something else holds the thread.
    pub(in crate::runs) busy: bool,
    /// Set if the run answers messages again that an earlier run brought into the transcript.
    pub(in crate::runs) rerun: Option<Rerun>,
    /// Whether the gateway's thread is bound to an upstream thread that had these messages before.
    pub(in crate::runs) holds_input: bool,
    /// Whether the upstream may already have the next round's request.
    pub(in crate::runs) is_uncertain: bool,
    /// Whether something was sent again although an earlier request for it was sent and had no
    /// answer.
    pub(in crate::runs) sent_again: bool,
}

impl Progress {
    pub(in crate::runs) fn new(started: &StartedRun) -> Self {
        let recovery = started.run.recovery.clone();
        let bound = started.thread.upstream_thread_id.clone();
        let trial = recovery.as_ref().and_then(RunRecovery::open_trial);
        let rerun = started.run.rerun;
        let has_moved = recovery
            .as_ref()
            .and_then(|it| it.trial.as_ref())
            .is_some_and(|trial| bound.as_ref() == Some(&trial.thread));
        Self {
            rerun,
            holds_input: rerun.is_some_and(Rerun::is_upstream) && !has_moved,
            thread: trial.map(|trial| trial.thread.clone()).or(bound),
            recovery,
            upstream_run: started.run.upstream_run_id.clone(),
            intent: started.intent,
            inputs: u32::try_from(started.input.len()).unwrap_or(u32::MAX),
            ..Self::default()
        }
    }

    /// Takes over the progress that another process recorded. `content`: the content of the run's
    /// earlier rounds.
    pub(in crate::runs) fn taken_over(
        &mut self,
        thread: &Thread,
        content: Vec<ContentPart>,
        stored: StoredProgress,
    ) {
        self.delivery = match &self.upstream_run {
            Some(_) => Delivery::Accepted,
            // The earlier run is settled before anything is sent to its upstream thread, so nothing
            // of this run was sent.
            None if thread.unsettled_run.is_some() && self.recovery.is_none() => Delivery::NotSent,
            None => Delivery::Sent,
        };
        self.unacknowledged_requests = u32::from(self.delivery == Delivery::Sent);
        self.content = content;
        self.text = stored.log.text;
        let has_all = self
            .recovery
            .as_ref()
            .and_then(RunRecovery::open_trial)
            .is_some();
        if !has_all {
            self.include_history(&stored.unsynced);
        }
        // Their number is not known, but there is at least one.
        self.inputs = self.inputs.max(1);
    }

    /// Notes that these unsynced messages are sent with the run.
    pub(in crate::runs) fn include_history(&mut self, history: &[Message]) {
        self.history_users = count_users(history);
        self.synced = !history.is_empty();
    }

    /// Notes that these outputs are sent next. `is_uncertain`: the upstream may already have them.
    pub(in crate::runs) fn answers(&mut self, outputs: &[ToolOutput], is_uncertain: bool) {
        let call = |output: &ToolOutput| ToolCall {
            id: output.tool_call_id.clone(),
            kind: output.kind,
            ..ToolCall::default()
        };
        self.open_calls = outputs.iter().map(call).collect();
        self.is_uncertain = is_uncertain;
        self.unacknowledged_requests += u32::from(is_uncertain);
    }

    /// Notes that the upstream has the run under this id.
    pub(in crate::runs) fn accepted(&mut self, id: UpstreamRunId) {
        if self.upstream_run.as_ref() != Some(&id) {
            self.heard();
        }
        self.upstream_run = Some(id);
        (self.delivery, self.busy) = (Delivery::Accepted, false);
        self.open_calls.clear();
    }

    /// Notes that the result of the last request is known.
    pub(in crate::runs) const fn heard(&mut self) {
        self.unacknowledged_requests = self.unacknowledged_requests.saturating_sub(1);
    }

    /// Notes that the round ended with function calls.
    pub(in crate::runs) fn asked(&mut self, ended: Ended) {
        self.open_calls = ended.tool_calls;
        self.said(ended.content, ended.usage);
    }

    /// Returns the text of all rounds that readers have seen.
    pub(in crate::runs) fn shown(&self) -> ReplyText {
        let mut shown = ReplyText::of(&self.content);
        for delta in self.text.clone().into_deltas() {
            shown.push(delta.origin, &delta.text);
        }
        shown
    }

    /// Adds the content and the usage of a round.
    pub(in crate::runs) fn said(&mut self, content: Vec<ContentPart>, usage: Option<Usage>) {
        self.text.clear();
        self.rounds_before = self.content.len();
        append_messages(&mut self.content, content);
        self.usage = usage.or(self.usage);
    }
}
