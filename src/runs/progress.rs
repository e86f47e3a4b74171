//! What is known of a turn while it goes on.

use crate::domain::{ContentPart, ToolCall, ToolOutput, UpstreamRunId, UpstreamThreadId, Usage};
use crate::store::Turn;
use crate::upstream::Ended;

/// How far a turn has come.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Reach {
    /// Nothing of it is at the upstream.
    #[default]
    Here,
    /// A request is or may be there.
    Sent,
    /// The upstream has accepted the run.
    Accepted,
}

/// What is known of a turn while it goes on; it survives when the turn is cut off.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    pub(super) thread: Option<UpstreamThreadId>,
    /// The newest id: each round of a chain of responses has its own.
    pub(super) upstream_run: Option<UpstreamRunId>,
    pub(super) reach: Reach,
    /// Function calls that are not known to be answered.
    pub(super) open_calls: Vec<ToolCall>,
    /// What the rounds before this one said.
    pub(super) content: Vec<ContentPart>,
    /// How much of it was said before the last round that said something.
    pub(super) rounds_before: usize,
    /// What this one has said so far.
    pub(super) text: String,
    pub(super) usage: Option<Usage>,
    /// Earlier messages went along that the thread lacked.
    pub(super) synced: bool,
    /// How many of these were the user's.
    pub(super) history_users: u32,
    pub(super) inputs: u32,
    pub(super) cost: usize,
    /// The upstream says that something else holds the thread.
    pub(super) busy: bool,
    /// What the next round is to send may be there already.
    pub(super) is_uncertain: bool,
}

impl Progress {
    pub(super) fn new(turn: &Turn) -> Self {
        Self {
            thread: turn.thread.upstream_thread_id.clone(),
            upstream_run: turn.run.upstream_run_id.clone(),
            inputs: u32::try_from(turn.input.len()).unwrap_or(u32::MAX),
            ..Self::default()
        }
    }

    /// The run was at work in another process.
    pub(super) fn taken_over(&mut self, content: Vec<ContentPart>) {
        self.reach = if self.upstream_run.is_some() { Reach::Accepted } else { Reach::Sent };
        self.content = content;
        // Of which it is only known that they are there.
        self.inputs = self.inputs.max(1);
    }

    /// These outputs are the next to be sent. `is_uncertain`: they may be there already.
    pub(super) fn answers(&mut self, outputs: &[ToolOutput], is_uncertain: bool) {
        let call = |output: &ToolOutput| ToolCall {
            id: output.tool_call_id.clone(),
            name: String::new(),
            arguments: String::new(),
        };
        self.open_calls = outputs.iter().map(call).collect();
        self.is_uncertain = is_uncertain;
    }

    /// The round ended with function calls.
    pub(super) fn asked(&mut self, ended: Ended) {
        self.open_calls = ended.tool_calls;
        self.said(ended.content, ended.usage);
    }

    /// Takes in what a round said and cost.
    pub(super) fn said(&mut self, content: Vec<ContentPart>, usage: Option<Usage>) {
        self.text.clear();
        self.rounds_before = self.content.len();
        self.content.extend(content);
        self.usage = usage.or(self.usage);
    }
}
