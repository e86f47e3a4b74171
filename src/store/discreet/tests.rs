use tempfile::TempDir;

use super::*;
use crate::config::StoreConfig;
use crate::domain::{
    ContentPart, Leftover, Limits, LoggedEvent, Metadata, Role, Scope, TenantKey, ToolCall, ToolOutput,
    UpstreamRunId, UserKey,
};
use crate::store::{Foreign, ImportedMessage, Life, Reply, SqliteStore};

struct World {
    store: Discreet,
    inner: Arc<dyn Store>,
    key: ConversationKey,
    replica: ReplicaId,
    _folder: TempDir,
}

fn text(text: &str) -> Vec<ContentPart> {
    vec![ContentPart::Text { text: text.to_owned() }]
}

fn action(arguments: &str) -> RequiredAction {
    let call = ToolCall { id: "call".to_owned(), name: "f".to_owned(), arguments: arguments.to_owned() };
    RequiredAction { tool_calls: vec![call] }
}

fn pause(arguments: &str) -> Pause {
    Pause {
        required_action: action(arguments),
        upstream_run_id: Some(UpstreamRunId("up".to_owned())),
        content: text("so far"),
        usage: None,
        events: EventBatch {
            first: 0,
            events: vec![
                LoggedEvent::Started,
                LoggedEvent::Delta("so far".to_owned()),
                LoggedEvent::RequiresAction(action(arguments)),
            ],
        },
    }
}

fn end(status: RunStatus) -> RunEnd {
    RunEnd {
        status,
        error: None,
        usage: None,
        upstream_run_id: None,
        unheard: 0,
        upstream_thread_id: None,
        reply: None,
        said: Context::Present,
        synced: false,
        leftover: None,
        discard: false,
        events: EventBatch { first: 3, events: vec![LoggedEvent::Delta("more".to_owned())] },
        drops_log: false,
    }
}

impl World {
    async fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let url = format!("sqlite:{}", folder.path().join("t.db").display());
        let config = StoreConfig { url: Some(url.into()), ..StoreConfig::default() };
        let inner = SqliteStore::open(&config).await.unwrap();
        inner.migrate().await.unwrap();
        let inner: Arc<dyn Store> = Arc::new(inner);
        let user = UserKey::try_from("alice".to_owned()).unwrap();
        let key = ConversationKey { tenant: TenantKey::default(), user, scope: Scope::User };
        let store = Discreet::new(Arc::clone(&inner));
        Self { store, inner, key, replica: ReplicaId::new(), _folder: folder }
    }

    fn admission(&self, strategy: MultitaskStrategy, said: &str) -> Admission {
        Admission {
            key: self.key.clone(),
            new_thread: ThreadId::new(),
            limits: Limits::NONE,
            ttl: None,
            upstream: "main".to_owned(),
            run_id: RunId::new(),
            assistant: "default".to_owned(),
            strategy,
            metadata: Metadata::default(),
            message: InputMessage { id: MessageId::new(), content: text(said) },
            timeout: Duration::from_mins(1),
            replica: self.replica,
            idempotency: None,
        }
    }

    async fn start(&self, said: &str) -> Turn {
        match self.store.admit(&self.admission(MultitaskStrategy::Enqueue, said)).await.unwrap() {
            Admitted::Started(turn) => *turn,
            other => panic!("{other:?}"),
        }
    }

    async fn queue(&self, said: &str) -> (RunLease, Run) {
        match self.store.admit(&self.admission(MultitaskStrategy::Enqueue, said)).await.unwrap() {
            Admitted::Queued { lease, run, .. } => (lease, *run),
            other => panic!("{other:?}"),
        }
    }

    /// The texts of what a queued run says once it starts.
    async fn claim(&self, lease: &RunLease) -> Vec<Vec<ContentPart>> {
        match self.store.claim(lease).await.unwrap() {
            Claim::Started(turn) => turn.input.into_iter().map(|message| message.content).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn held(&self) -> usize {
        self.store.held().len()
    }
}

#[tokio::test]
async fn what_a_run_says_is_held_until_it_ends() {
    let world = World::new().await;
    let turn = world.start("one").await;
    assert_eq!(turn.input[0].content, text("one"));
    let (lease, run) = world.queue("two").await;
    let merge = world.admission(MultitaskStrategy::Merge, "three");
    let merged = world.store.admit(&merge).await.unwrap();
    assert!(matches!(merged, Admitted::Merged { run: into, .. } if into.id == run.id));
    assert_eq!(
        world.store.admit(&world.admission(MultitaskStrategy::Reject, "no")).await.unwrap(),
        Admitted::Busy
    );
    assert_eq!(world.held(), 2, "one for each run");
    let below = world.inner.transcript(turn.thread.id, 0, 10).await.unwrap();
    assert_eq!(below.iter().map(|it| it.content.len()).collect::<Vec<_>>(), [0]);

    let reply = Reply {
        id: MessageId::new(),
        content: text("reply"),
        upstream_message_id: None,
        context: Context::Missing,
    };
    let whole = RunEnd { reply: Some(reply), ..end(RunStatus::Completed) };
    for _ in 0..2 {
        let Closing::Finished(finished) = world.store.finish(&turn.lease, &whole).await.unwrap() else {
            panic!("it was at work")
        };
        let message = finished.message.unwrap();
        assert_eq!((message.content, message.context), (text("reply"), Context::Withheld));
    }
    for _ in 0..2 {
        assert_eq!(world.claim(&lease).await, [text("two"), text("three")]);
    }
    let below = world.inner.transcript(turn.thread.id, 0, 10).await.unwrap();
    assert!(below.len() == 4 && below.iter().all(|it| it.content.is_empty()), "{below:#?}");
    assert!(world.store.backlog(run.id, None, 10).await.unwrap().data.is_empty());
    let left = Leftover {
        run: run.id,
        thread: None,
        upstream_run: None,
        open_calls: action("secret").tool_calls,
        baseline: Baseline::default(),
        inputs: 2,
        synced: false,
        remove: false,
    };
    let cut = RunEnd { said: Context::Unknown, leftover: Some(left), ..end(RunStatus::Cancelled) };
    let Closing::Finished(finished) = world.store.finish(&lease, &cut).await.unwrap() else {
        panic!("it was at work")
    };
    assert_eq!(finished.thread.leftover.unwrap().open_calls, action("").tool_calls);
    assert_eq!(world.held(), 0);
}

/// The run that a message joins may start before the admission is answered.
#[tokio::test]
async fn a_message_that_is_just_joining_is_found() {
    let world = World::new().await;
    let turn = world.start("one").await;
    let (lease, run) = world.queue("two").await;
    let merge = world.admission(MultitaskStrategy::Merge, "three");
    let blank = Admission { message: blank_input(&merge.message), ..merge.clone() };
    let held = Held { input: vec![merge.message.clone()], ..Held::default() };
    world.store.held().insert(merge.run_id, held);
    world.inner.admit(&blank).await.unwrap();
    world.store.finish(&turn.lease, &end(RunStatus::Completed)).await.unwrap();
    assert_eq!(world.claim(&lease).await, [text("two"), text("three")]);
    world.store.joins(run.id, &merge.message);
    world.store.forget(merge.run_id);
    assert_eq!(world.claim(&lease).await, [text("two"), text("three")]);
    world.store.finish(&lease, &end(RunStatus::Completed)).await.unwrap();
    // Nor does one that comes too late stay.
    world.store.joins(run.id, &merge.message);
    assert_eq!(world.held(), 0);
}

#[tokio::test]
async fn calls_are_told_whole_and_compared_as_they_are_stored() {
    let world = World::new().await;
    let turn = world.start("one").await;
    for _ in 0..2 {
        let Paused::Waiting(waiting) = world.store.pause(&turn.lease, &pause("secret")).await.unwrap() else {
            panic!("it is in progress")
        };
        assert_eq!(waiting.run.required_action, Some(action("secret")));
    }
    let seen = |run: Option<(Run, Option<Message>)>| run.unwrap().0.required_action;
    let run = turn.run.id;
    assert_eq!(seen(world.store.run(&world.key, run).await.unwrap()), Some(action("secret")));
    assert_eq!(seen(world.inner.run(&world.key, run).await.unwrap()), Some(action("")));
    let batches = world.inner.events(run, 0).await.unwrap();
    let logged =
        [LoggedEvent::Started, LoggedEvent::Omitted { units: 6 }, LoggedEvent::RequiresAction(action(""))];
    assert_eq!(batches, [EventBatch { first: 0, events: logged.to_vec() }]);

    let output = ToolOutput { tool_call_id: "call".to_owned(), output: "cold".to_owned() };
    let answer = |expected| ToolAnswer { expected, outputs: vec![output.clone()], idempotency: None };
    let other = world.store.answer_tools(&world.key, run, &answer(action("other"))).await.unwrap();
    assert_eq!(other, Answered::NotWaiting);
    let taken = world.store.answer_tools(&world.key, run, &answer(action("secret"))).await.unwrap();
    assert!(matches!(taken, Answered::Resumed(_)), "{taken:?}");
    assert!(matches!(&world.inner.requests(world.replica).await.unwrap()[..], [Request::Resume { .. }]));
    assert_eq!(world.store.requests(world.replica).await.unwrap(), [], "there is nothing to hand over");
}

#[tokio::test]
async fn what_is_taken_over_has_lost_what_it_was_to_send() {
    let world = World::new().await;
    let turn = world.start("one").await;
    let (queued, _) = world.queue("two").await;
    world.store.pause(&turn.lease, &pause("secret")).await.unwrap();
    // Another process on the same record.
    let other = Discreet::new(Arc::clone(&world.inner));
    let heir = ReplicaId::new();
    let orphans = other.adopt_orphans(heir, &[], 9).await.unwrap();
    let lost: Vec<_> = orphans.iter().map(|it| (it.run.status, it.content_lost)).collect();
    assert_eq!(lost, [(RunStatus::RequiresAction, false), (RunStatus::Queued, true)]);
    assert_eq!(orphans[0].content, [], "what it had said is not known either");
    // Outputs that come now reach it, unless this process ends before it has sent them.
    let output = ToolOutput { tool_call_id: "call".to_owned(), output: "cold".to_owned() };
    let answer = ToolAnswer { expected: action(""), outputs: vec![output], idempotency: None };
    let taken = other.answer_tools(&world.key, turn.run.id, &answer).await.unwrap();
    assert!(matches!(taken, Answered::Resumed(_)), "{taken:?}");
    let again = other.adopt_orphans(heir, &[], 1).await.unwrap();
    assert!(again[0].content_lost);
    // The first process hears that its runs are gone, and forgets them.
    assert_eq!(world.held(), 2);
    assert_eq!(world.store.claim(&queued).await.unwrap(), Claim::Lost);
    assert_eq!(world.store.lost(world.replica, &[turn.run.id]).await.unwrap(), [turn.run.id]);
    assert_eq!(world.held(), 0);
}

#[tokio::test]
async fn what_comes_from_elsewhere_is_not_stored_either() {
    let world = World::new().await;
    let turn = world.start("one").await;
    world.store.finish(&turn.lease, &end(RunStatus::Completed)).await.unwrap();
    let imported = ImportedMessage {
        id: MessageId::new(),
        role: Role::User,
        content: text("imported"),
        upstream_message_id: None,
        context: Some(Context::Missing),
        created_at: None,
    };
    let thread = turn.thread.id;
    assert_eq!(world.store.import_messages(thread, &[imported]).await.unwrap(), 1);
    let foreign = Foreign {
        id: MessageId::new(),
        after: 1,
        role: Role::User,
        content: text("foreign"),
        upstream_message_id: Some("item".to_owned()),
        created_at: None,
    };
    assert_eq!(world.store.insert_foreign(thread, None, &[foreign]).await.unwrap(), 1);
    let below = world.inner.transcript(thread, 0, 10).await.unwrap();
    let below: Vec<_> = below.iter().map(|message| (message.content.len(), message.context)).collect();
    assert_eq!(below, [(0, Context::Present), (0, Context::Present), (0, Context::Withheld)]);
}

#[tokio::test]
async fn a_refused_message_is_forgotten() {
    let world = World::new().await;
    world.start("one").await;
    let other =
        Admission { upstream: "other".to_owned(), ..world.admission(MultitaskStrategy::Enqueue, "two") };
    assert_eq!(world.store.admit(&other).await.unwrap(), Admitted::OtherUpstream("main".to_owned()));
    assert_eq!(world.held(), 1);
    world.inner.close().await;
    assert!(world.store.admit(&world.admission(MultitaskStrategy::Enqueue, "three")).await.is_err());
    let speaks = |held: &&Held| !held.input.is_empty();
    assert_eq!(world.store.held().values().filter(speaks).count(), 1, "it never starts");
}

/// The admission of the run's own message was not answered, and another one joins before it is taken back.
#[tokio::test]
async fn message_that_joined_a_refused_one_is_said() {
    let world = World::new().await;
    let turn = world.start("one").await;
    let refused = world.admission(MultitaskStrategy::Enqueue, "two");
    let Admitted::Queued { lease, .. } = world.store.admit(&refused).await.unwrap() else {
        panic!("the thread is busy")
    };
    world.store.leaves(refused.run_id, refused.message.id);
    let joins = world.admission(MultitaskStrategy::Merge, "three");
    assert!(matches!(world.store.admit(&joins).await.unwrap(), Admitted::Merged { .. }));
    let end_of_refused = RunEnd { discard: true, ..end(RunStatus::Failed) };
    let taken = Withdrawal { message: refused.message.id, idempotency_key: None, end: end_of_refused };
    assert!(matches!(world.store.withdraw(&lease, &taken).await.unwrap(), Withdrawn::Shared { .. }));
    world.store.finish(&turn.lease, &end(RunStatus::Completed)).await.unwrap();
    assert_eq!(world.claim(&lease).await, [text("three")]);
    world.store.finish(&lease, &end(RunStatus::Completed)).await.unwrap();
    assert_eq!(world.held(), 0);
}

#[test]
fn what_is_held_is_not_printed() {
    let world = tokio::runtime::Runtime::new().unwrap().block_on(async {
        let world = World::new().await;
        world.start("planted").await;
        world
    });
    assert!(!format!("{:?}", world.store).contains("planted"));
}
