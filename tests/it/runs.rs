//! The use cases with parts that misbehave as no real one can be made to.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;
use threadkeeper::config::{AssistantConfig, Config};
use threadkeeper::domain::{
    ContentPart, ConversationKey, Message, Metadata, MultitaskStrategy, ReplicaId, RunErrorCode, RunStatus,
    Scope, TenantKey, UpstreamRunId, UpstreamThreadId, UserKey,
};
use threadkeeper::runs::{NewMessage, RunEvent, Runs, RunsParts};
use threadkeeper::upstream::{
    EventStream, Leftover, Ownership, StartRun, Upstream, UpstreamError, UpstreamEvent,
};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::support::TestDatabase;

/// Panics at every step that the word of the turn names.
#[derive(Debug)]
struct Clumsy;

#[async_trait]
impl Upstream for Clumsy {
    async fn create_thread(
        &self,
        _: &Ownership,
        _: &[Message],
    ) -> Result<Option<UpstreamThreadId>, UpstreamError> {
        Ok(Some(UpstreamThreadId("thread".to_owned())))
    }

    async fn start(&self, request: StartRun<'_>) -> Result<EventStream, UpstreamError> {
        let ContentPart::Text { text } = &request.input[0].content[0] else {
            unreachable!("the tests send text")
        };
        assert_ne!(text, "start", "planted");
        let accepted = Ok(UpstreamEvent::Accepted(UpstreamRunId("run".to_owned())));
        let events = futures_util::stream::iter([accepted]);
        Ok(match text.as_str() {
            "stream" => events.chain(futures_util::stream::once(async { panic!("planted") })).boxed(),
            _ => events.boxed(),
        })
    }

    async fn settle(&self, _: &Leftover) -> Result<(), UpstreamError> {
        panic!("planted")
    }
}

fn key() -> ConversationKey {
    let user = UserKey::try_from("alice".to_owned()).unwrap();
    ConversationKey { tenant: TenantKey::default(), user, scope: Scope::User }
}

#[tokio::test]
async fn a_panic_in_an_adapter_ends_the_run_and_frees_the_thread() {
    let database = TestDatabase::sqlite().await;
    let config = Config::default();
    let clumsy: Arc<dyn Upstream> = Arc::new(Clumsy);
    let assistant = AssistantConfig { upstream: "clumsy".to_owned(), ..AssistantConfig::default() };
    let runs = Runs::new(RunsParts {
        store: database.store().await,
        upstreams: BTreeMap::from([("clumsy".to_owned(), clumsy)]),
        assistants: BTreeMap::from([("default".to_owned(), assistant)]),
        default_assistant: "default".to_owned(),
        runs: config.runs,
        sessions: config.sessions,
        admission_timeout: Duration::from_secs(5),
        replica: ReplicaId::new(),
        tasks: TaskTracker::new(),
        draining: CancellationToken::new(),
        stop: CancellationToken::new(),
    });
    let message = |text: &str| NewMessage {
        content: vec![ContentPart::Text { text: text.to_owned() }].try_into().unwrap(),
        assistant: None,
        // Refused if the run before still held its place or its thread.
        strategy: MultitaskStrategy::Reject,
        metadata: Metadata::default(),
        timeout: None,
        cancel: CancellationToken::new(),
    };
    assert!(
        runs.submit(key(), message("too early")).await.is_err(),
        "a replica that is not registered takes nothing"
    );
    runs.renew("127.0.0.1:1", Duration::from_mins(1)).await.unwrap();
    // The last one panics only while it is settled, after its stream broke off.
    for (text, code) in [
        ("start", RunErrorCode::Internal),
        ("stream", RunErrorCode::Internal),
        ("settle", RunErrorCode::StreamBroken),
    ] {
        let submitted = runs.submit(key(), message(text)).await.unwrap();
        let events: Vec<_> = submitted.feed.follow(0).map(|(_, event)| event).collect().await;
        let Some(RunEvent::Ended(outcome)) = events.last() else { panic!("{text}: {events:?}") };
        assert_eq!(outcome.run.status, RunStatus::Failed, "{text}");
        assert_eq!(outcome.run.error.as_ref().unwrap().code, code, "{text}");
        assert!(submitted.feed.ended().await.is_some());
    }
}
