//! What is known of a run while it goes on.

use super::history::count_users;
use crate::domain::{
    ContentPart, Message, OrphanId, Thread, ToolCall, ToolOutput, UpstreamRunId, UpstreamThreadId,
    Usage,
};
use crate::runs::log::stored::StoredLog;
use crate::store::StartedRun;
use crate::upstream::Ended;

/// How far a run has come on its way to the upstream.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(in crate::runs) enum Delivery {
    /// Nothing of it is at the upstream.
    #[default]
    NotSent,
    /// A request is or may be there.
    Sent,
    /// The upstream has accepted the run.
    Accepted,
}

/// What is stored of a run that another process worked on, besides the run itself.
#[derive(Clone, Debug, Default)]
pub(in crate::runs) struct StoredProgress {
    pub(in crate::runs) log: StoredLog,
    /// What its thread lacked before. If the run was sent, this was sent with it.
    pub(in crate::runs) backlog: Vec<Message>,
}

/// What is known of a run while it goes on. It survives when the run is cut off.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(in crate::runs) struct Progress {
    pub(in crate::runs) thread: Option<UpstreamThreadId>,
    /// The newest id: each round of a chain of responses has its own.
    pub(in crate::runs) upstream_run: Option<UpstreamRunId>,
    pub(in crate::runs) delivery: Delivery,
    /// Under this id it is recorded that an upstream thread is about to be made, and nobody makes it yet.
    pub(in crate::runs) intent: Option<OrphanId>,
    /// Requests that may be at the upstream under ids that it has not told.
    pub(in crate::runs) unacknowledged_requests: u32,
    /// Function calls that are not known to be answered.
    pub(in crate::runs) open_calls: Vec<ToolCall>,
    /// What the rounds before this one said.
    pub(in crate::runs) content: Vec<ContentPart>,
    /// How much of it was said before the last round that said something.
    pub(in crate::runs) rounds_before: usize,
    /// What this one has said so far.
    pub(in crate::runs) text: String,
    pub(in crate::runs) usage: Option<Usage>,
    /// Earlier messages that the thread lacked were sent with it.
    pub(in crate::runs) synced: bool,
    /// How many of these were the user's.
    pub(in crate::runs) history_users: u32,
    pub(in crate::runs) inputs: u32,
    pub(in crate::runs) cost: usize,
    /// The upstream says that something else holds the thread.
    pub(in crate::runs) busy: bool,
    /// What the next round is to send may be there already.
    pub(in crate::runs) is_uncertain: bool,
    /// Something was sent again although an earlier request for it had been sent and had no answer.
    pub(in crate::runs) sent_again: bool,
}

impl Progress {
    pub(in crate::runs) fn new(started: &StartedRun) -> Self {
        Self {
            thread: started.thread.upstream_thread_id.clone(),
            upstream_run: started.run.upstream_run_id.clone(),
            intent: started.intent,
            inputs: u32::try_from(started.input.len()).unwrap_or(u32::MAX),
            ..Self::default()
        }
    }

    /// The run was at work in another process, and what is known of that is what it recorded. `content`: what its earlier
    /// rounds had said.
    pub(in crate::runs) fn taken_over(
        &mut self,
        thread: &Thread,
        content: Vec<ContentPart>,
        stored: StoredProgress,
    ) {
        self.delivery = match &self.upstream_run {
            Some(_) => Delivery::Accepted,
            // That is settled before anything is sent.
            None if thread.unsettled_run.is_some() => Delivery::NotSent,
            None => Delivery::Sent,
        };
        self.unacknowledged_requests = u32::from(self.delivery == Delivery::Sent);
        self.content = content;
        self.text = stored.log.text;
        self.include_history(&stored.backlog);
        // Of which it is only known that they are there.
        self.inputs = self.inputs.max(1);
    }

    /// These messages, which the thread lacks, are sent with the run.
    pub(in crate::runs) fn include_history(&mut self, history: &[Message]) {
        self.history_users = count_users(history);
        self.synced = !history.is_empty();
    }

    /// These outputs are the next to be sent. `is_uncertain`: they may be there already.
    pub(in crate::runs) fn answers(&mut self, outputs: &[ToolOutput], is_uncertain: bool) {
        let call = |output: &ToolOutput| ToolCall {
            id: output.tool_call_id.clone(),
            name: String::new(),
            arguments: String::new(),
        };
        self.open_calls = outputs.iter().map(call).collect();
        self.is_uncertain = is_uncertain;
        self.unacknowledged_requests += u32::from(is_uncertain);
    }

    /// The upstream has the run under this id.
    pub(in crate::runs) fn accepted(&mut self, id: UpstreamRunId) {
        if self.upstream_run.as_ref() != Some(&id) {
            self.heard();
        }
        self.upstream_run = Some(id);
        (self.delivery, self.busy) = (Delivery::Accepted, false);
        self.open_calls.clear();
    }

    /// It is known what became of the last request.
    pub(in crate::runs) const fn heard(&mut self) {
        self.unacknowledged_requests = self.unacknowledged_requests.saturating_sub(1);
    }

    /// The round ended with function calls.
    pub(in crate::runs) fn asked(&mut self, ended: Ended) {
        self.open_calls = ended.tool_calls;
        self.said(ended.content, ended.usage);
    }

    /// The text that readers have seen of all rounds.
    pub(in crate::runs) fn shown(&self) -> String {
        let before: String = self
            .content
            .iter()
            .filter_map(ContentPart::as_text)
            .collect();
        before + &self.text
    }

    /// Takes in what a round said and cost.
    pub(in crate::runs) fn said(&mut self, content: Vec<ContentPart>, usage: Option<Usage>) {
        self.text.clear();
        self.rounds_before = self.content.len();
        self.content.extend(content);
        self.usage = usage.or(self.usage);
    }
}
