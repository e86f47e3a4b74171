//! A thread on the simulator, in each way in which an upstream can keep one.

use futures_util::StreamExt;
use threadkeeper::config::{AssistantConfig, UpstreamConfig, UpstreamKind};
use threadkeeper::domain::{
    Baseline, ContentPart, Message, MessageId, Metadata, Role, RunId, ThreadId, ToolCall,
    ToolOutput, UnsettledRun, UpstreamRunId, UpstreamSync, UpstreamThreadId,
};
use threadkeeper::simulator::{Fault, SimulatorConfig};
use threadkeeper::store::InputMessage;
use threadkeeper::upstream::{
    AnswerTools, Ended, EventStream, StartRun, Upstream, UpstreamError, UpstreamEvent,
};

use super::simulated::assert_requests_are_valid;
use super::{adapter, config, owner, profile};
use crate::support::wire::Sim;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Flavour {
    Assistants,
    Conversations,
    Chain,
    /// Conversations with background responses.
    Background,
    BackgroundChain,
}

pub(super) const ALL: [Flavour; 5] = [
    Flavour::Assistants,
    Flavour::Conversations,
    Flavour::Chain,
    Flavour::Background,
    Flavour::BackgroundChain,
];

impl Flavour {
    pub(super) fn is_chain(self) -> bool {
        matches!(self, Self::Chain | Self::BackgroundChain)
    }

    pub(super) fn is_background(self) -> bool {
        matches!(self, Self::Background | Self::BackgroundChain)
    }

    fn kind(self) -> UpstreamKind {
        if self == Self::Assistants {
            UpstreamKind::Assistants
        } else {
            UpstreamKind::Responses
        }
    }
}

/// A run on a thread, with its adapter and simulator.
pub(super) struct Scene {
    pub(super) flavour: Flavour,
    pub(super) sim: Sim,
    pub(super) upstream: Box<dyn Upstream>,
    /// `None` before the first run of a chain.
    pub(super) thread: Option<UpstreamThreadId>,
    pub(super) run: RunId,
    pub(super) history: Vec<Message>,
    pub(super) baseline: Baseline,
    assistant: AssistantConfig,
}

/// The result of a run.
pub(super) struct Said {
    pub(super) accepted: UpstreamRunId,
    pub(super) streamed: String,
    pub(super) ended: Ended,
}

impl Scene {
    pub(super) async fn new(flavour: Flavour) -> Self {
        Self::with(flavour, SimulatorConfig::default(), |_| ()).await
    }

    pub(super) async fn with(
        flavour: Flavour,
        simulator: SimulatorConfig,
        change: impl FnOnce(&mut UpstreamConfig),
    ) -> Self {
        let sim = Sim::start(SimulatorConfig {
            conversations: !flavour.is_chain(),
            ..simulator
        })
        .await;
        let mut settings = config(flavour.kind(), &sim.base);
        settings.conversations = !flavour.is_chain();
        settings.background = flavour.is_background();
        change(&mut settings);
        let upstream = adapter(&settings);
        let thread = upstream.create_thread(&owner(), &[]).await.unwrap();
        assert_eq!(thread.is_none(), flavour.is_chain());
        let mut assistant = profile();
        assistant.assistant_id = assistant
            .assistant_id
            .filter(|_| flavour == Flavour::Assistants);
        let (run, history, baseline) = (RunId::new(), Vec::new(), Baseline::default());
        Self {
            flavour,
            sim,
            upstream,
            thread,
            run,
            history,
            baseline,
            assistant,
        }
    }

    /// Begins another run, whose messages start at this baseline.
    pub(super) fn next_run(&mut self, baseline: Baseline) {
        (self.run, self.baseline) = (RunId::new(), baseline);
    }

    pub(super) async fn start(&self, text: &str) -> Result<EventStream, UpstreamError> {
        let content = vec![ContentPart::text(text)];
        let request = StartRun {
            run: self.run,
            thread: self.thread.as_ref(),
            owner: &owner(),
            history: &self.history,
            assistant: &self.assistant,
            input: &[InputMessage {
                id: MessageId::new(),
                content,
            }],
            metadata: &Metadata::default(),
        };
        self.upstream.start(request).await
    }

    /// Sends a message and reads its run to the end.
    pub(super) async fn say(&self, text: &str) -> Said {
        read(self.start(text).await.unwrap()).await
    }

    /// Sends the same output for all calls of a run.
    pub(super) async fn try_answer(
        &self,
        asked: &Said,
        output: &str,
    ) -> Result<EventStream, UpstreamError> {
        let output = |call: &ToolCall| ToolOutput::text(call.id.clone(), output);
        let outputs: Vec<ToolOutput> = asked.ended.tool_calls.iter().map(output).collect();
        let request = AnswerTools {
            run: self.run,
            thread: self.thread.as_ref(),
            owner: &owner(),
            upstream_run: Some(&asked.accepted).filter(|id| !id.0.is_empty()),
            assistant: &self.assistant,
            outputs: &outputs,
            metadata: &Metadata::default(),
        };
        self.upstream.answer_tools(request).await
    }

    pub(super) async fn answer(&self, asked: &Said, output: &str) -> Said {
        read(self.try_answer(asked, output).await.unwrap()).await
    }

    /// The run as the gateway knows it before it is settled.
    pub(super) fn unsettled_run(&self, upstream_run: Option<&UpstreamRunId>) -> UnsettledRun {
        UnsettledRun {
            run: self.run,
            thread: self.thread.clone(),
            upstream_run: upstream_run.cloned(),
            open_calls: Vec::new(),
            baseline: self.baseline.clone(),
            inputs: 1,
            synced: false,
            remove: false,
        }
    }

    /// Makes the next request of this kind fail with this fault.
    pub(super) fn plant(&self, on: &str, fault: &str) {
        self.sim
            .handle
            .add_fault(Fault {
                on: on.to_owned(),
                fault: fault.to_owned(),
                times: 1,
            })
            .unwrap();
    }

    /// Asserts that the adapter broke no rule, and that every request matches the published
    /// protocol.
    pub(super) fn assert_sound(&self) {
        assert_eq!(
            self.sim.handle.stats().violations,
            [""; 0],
            "{:?}",
            self.flavour
        );
        assert_requests_are_valid(self.flavour.kind(), &self.sim);
    }
}

/// Reads a stream to its end, which must be an end of the run.
pub(super) async fn read(events: EventStream) -> Said {
    let mut said = (None, String::new(), None);
    for event in events.collect::<Vec<_>>().await {
        match event.unwrap() {
            UpstreamEvent::Accepted(id) => said.0 = Some(id),
            UpstreamEvent::Text(delta) => said.1.push_str(&delta.text),
            UpstreamEvent::Ended(ended) => said.2 = Some(*ended),
        }
    }
    let nobody = UpstreamRunId(String::new());
    Said {
        accepted: said.0.unwrap_or(nobody),
        streamed: said.1,
        ended: said.2.unwrap(),
    }
}

pub(super) fn text_of(content: &[ContentPart]) -> String {
    content
        .iter()
        .map(|part| match part {
            ContentPart::Text { text, .. } => text.as_str(),
            other => panic!("the part is no text: {other:?}"),
        })
        .collect()
}

/// A message of an earlier run.
pub(super) fn earlier(role: Role, text: &str) -> Message {
    Message {
        id: MessageId::new(),
        thread_id: ThreadId::new(),
        position: 1,
        role,
        content: vec![ContentPart::text(text)],
        run_id: Some(RunId::new()),
        upstream_message_id: None,
        sync: UpstreamSync::Missing,
        ended: None,
        created_at: "2026-11-22T09:00:00Z".parse().unwrap(),
    }
}
