//! A scripted upstream: the first word of a message says what it does, and the test says how it
//! settles runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt, stream};
use threadkeeper::domain::{
    CallAnswer, ContentPart, Message, OutputContent, RunStatus, ThreadId, ToolCall, UnsettledRun,
    UpstreamRunId, UpstreamThreadId, Usage,
};
use threadkeeper::upstream::{
    AnswerTools, Capabilities, Disposal, Ended, EventStream, HistoryPage, Items, Ownership,
    RateLimiter, Recovered, Settled, StartRun, Upstream, UpstreamError, UpstreamEvent,
};
use tokio::sync::Semaphore;

/// The first word of a message decides:
/// - `hold`: replies after [`let_go`](Self::let_go),
/// - `ask`: asks for tool outputs, then replies,
/// - `ponder`: asks for tool outputs after [`let_go`](Self::let_go),
/// - `break`: accepts and breaks off, so that the run's state is unknown,
/// - `panic`, `falter`: panics, at once or within the stream.
///
/// Any other message gets a reply.
#[derive(Debug)]
pub(super) struct Scripted {
    /// Threads are chains of responses.
    chain: bool,
    /// The calls so far, in words.
    calls: Mutex<Vec<String>>,
    settling: Mutex<Settling>,
    /// The run whose messages were removed last.
    removed: Mutex<Option<UpstreamRunId>>,
    history_fails: AtomicBool,
    gate: Arc<Semaphore>,
}

/// The answer to settling a run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Settling {
    Fails,
    Hangs,
    /// As [`Held`](Self::Held), after [`let_go`](Scripted::let_go).
    Waits,
    Panics,
    /// The upstream has nothing of the run.
    Absent,
    /// The run completed, and the upstream has all of it.
    Held,
}

impl Scripted {
    pub(super) fn new(chain: bool) -> Arc<Self> {
        Arc::new(Self {
            chain,
            calls: Mutex::default(),
            settling: Mutex::new(Settling::Held),
            removed: Mutex::default(),
            history_fails: AtomicBool::new(false),
            gate: Arc::new(Semaphore::new(0)),
        })
    }

    /// Lets one held run continue: one that waits now, or the next one.
    pub(super) fn let_go(&self) {
        self.gate.add_permits(1);
    }

    pub(super) fn settles(&self, settling: Settling) {
        *self.settling.lock().unwrap() = settling;
    }

    /// From now on a list of the thread's messages fails.
    pub(super) fn fail_history(&self) {
        self.history_fails.store(true, Ordering::Relaxed);
    }

    /// Returns the calls since the last time.
    pub(super) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    /// Waits for [`let_go`](Self::let_go).
    async fn pass(&self) {
        self.gate
            .acquire()
            .await
            .expect("the gate is never closed")
            .forget();
    }

    fn note(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }

    fn ended(&self, status: RunStatus, content: &str, run: &UpstreamRunId) -> Ended {
        Ended {
            status,
            error: None,
            content: vec![ContentPart::text(content)],
            upstream_message_id: None,
            usage: Some(Usage {
                input_tokens: 1,
                output_tokens: 1,
                total_tokens: 2,
                ..Usage::default()
            }),
            tool_calls: Vec::new(),
            thread: (self.chain && status == RunStatus::Completed)
                .then(|| UpstreamThreadId(run.0.clone())),
            refusal: None,
        }
    }

    /// Accepts a run and ends it as `ended` says.
    fn events(&self, run: UpstreamRunId, held: bool, ended: Ended) -> EventStream {
        let gate = Arc::clone(&self.gate);
        let end = async move {
            if held {
                gate.acquire()
                    .await
                    .expect("the gate is never closed")
                    .forget();
            }
            Ok(UpstreamEvent::Ended(Box::new(ended)))
        };
        stream::iter([Ok(UpstreamEvent::Accepted(run))])
            .chain(end.into_stream())
            .boxed()
    }
}

/// Joins the texts of messages.
fn words<'a>(contents: impl IntoIterator<Item = &'a Vec<ContentPart>>) -> String {
    let texts = contents.into_iter().flatten().map(|part| match part {
        ContentPart::Text { text, .. } => text.as_str(),
        other => unreachable!("the tests send only text, not {other:?}"),
    });
    texts.collect::<Vec<_>>().join(" + ")
}

fn name(left: &UnsettledRun) -> &str {
    left.upstream_run
        .as_ref()
        .map_or("what nobody named", UpstreamRunId::as_str)
}

#[async_trait]
impl Upstream for Scripted {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            lock_window: Duration::ZERO,
            has_threads: !self.chain,
            stores_runs: self.chain,
            runs_without_input: false,
            goes_on_unread: false,
            takes_output_parts: false,
        }
    }

    async fn create_thread(
        &self,
        _: &Ownership,
        _: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError> {
        Ok((!self.chain).then(|| UpstreamThreadId("thread".to_owned())))
    }

    async fn delete_thread(
        &self,
        _: &UpstreamThreadId,
        _: &RateLimiter,
        _: &mut Items,
    ) -> Result<Disposal, UpstreamError> {
        Ok(Disposal::Deleted)
    }

    async fn delete_run(
        &self,
        _: &UpstreamRunId,
        _: &RateLimiter,
    ) -> Result<Disposal, UpstreamError> {
        Ok(Disposal::Deleted)
    }

    async fn history(
        &self,
        _: &UpstreamThreadId,
        _: Option<&str>,
        _: &RateLimiter,
    ) -> Result<Option<HistoryPage>, UpstreamError> {
        if self.history_fails.load(Ordering::Relaxed) {
            return Err(UpstreamError::Broken { timeout: false });
        }
        Ok(None)
    }

    async fn find_threads(
        &self,
        _: ThreadId,
        _: &RateLimiter,
    ) -> Result<Option<Vec<UpstreamThreadId>>, UpstreamError> {
        Ok(None)
    }

    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError> {
        let input = words(request.input.iter().map(|message| &message.content));
        let history = words(request.history.iter().map(|message| &message.content));
        self.note(format!("start [{history}] {input}"));
        let run = UpstreamRunId(format!("run of {input}"));
        let ended = self.ended(RunStatus::Completed, &format!("re {input}"), &run);
        Ok(
            match input.split_once(' ').map_or(&*input, |(first, _)| first) {
                "panic" => panic!("planted"),
                "falter" => {
                    let accepted = stream::iter([Ok(UpstreamEvent::Accepted(run))]);
                    accepted
                        .chain(stream::once(async { panic!("planted") }))
                        .boxed()
                }
                "break" => stream::iter([Ok(UpstreamEvent::Accepted(run))]).boxed(),
                first @ ("ask" | "ponder") => {
                    let call = ToolCall {
                        id: "call".to_owned(),
                        name: "f".to_owned(),
                        arguments: "{}".to_owned(),
                        ..ToolCall::default()
                    };
                    let asks = self.ended(RunStatus::RequiresAction, "let me see", &run);
                    self.events(
                        run,
                        first == "ponder",
                        Ended {
                            tool_calls: vec![call],
                            ..asks
                        },
                    )
                }
                first => self.events(run, first == "hold", ended),
            },
        )
    }

    async fn answer_tools(&self, request: AnswerTools<'_>) -> Result<EventStream, UpstreamError> {
        let CallAnswer::Output {
            output: OutputContent::Text(output),
            ..
        } = &request.outputs[0].answer
        else {
            panic!("{:?}", request.outputs)
        };
        self.note(format!("answer {output}"));
        let run = request.upstream_run.cloned().unwrap();
        let ended = self.ended(RunStatus::Completed, "thanks", &run);
        Ok(self.events(run, false, ended))
    }

    async fn recover(
        &self,
        _: &UnsettledRun,
        _: &UpstreamError,
    ) -> Result<Recovered, UpstreamError> {
        Ok(Recovered::Unknown)
    }

    async fn clear(
        &self,
        _: &UpstreamThreadId,
        _: Option<&UpstreamRunId>,
        _: bool,
    ) -> Result<(), UpstreamError> {
        Ok(())
    }

    async fn settle(&self, left: &UnsettledRun) -> Result<Settled, UpstreamError> {
        self.note(format!("settle {}", name(left)));
        let Some(run) = left.upstream_run.clone() else {
            return Ok(Settled::default());
        };
        let settling = *self.settling.lock().unwrap();
        if self.removed.lock().unwrap().as_ref() == Some(&run) {
            return Ok(Settled::default());
        }
        match settling {
            Settling::Fails => Err(UpstreamError::Broken { timeout: false }),
            Settling::Panics => panic!("planted"),
            Settling::Hangs => std::future::pending().await,
            Settling::Absent => Ok(Settled::default()),
            Settling::Held | Settling::Waits => {
                if settling == Settling::Waits {
                    self.pass().await;
                }
                Ok(Settled {
                    said: true,
                    status: Some(RunStatus::Completed),
                    content: vec![ContentPart::text("held")],
                    thread: self.chain.then(|| UpstreamThreadId(run.0)),
                    ..Settled::default()
                })
            }
        }
    }

    async fn remove(&self, left: &UnsettledRun) -> Result<(), UpstreamError> {
        self.note(format!("remove {}", name(left)));
        self.removed.lock().unwrap().clone_from(&left.upstream_run);
        Ok(())
    }
}
