//! SIGKILL at each step of a deletion, of a rollover, and of a run whose first try fails. A step is
//! a statement for the database or a request to the upstream. The kill comes before the step has
//! arrived, or before its answer has. The next process must finish what was begun.
//!
//! Each run of the suite kills at the first steps and at every fifth later one. The seed
//! (`THREADKEEPER_TEST_SEED`) chooses which. `THREADKEEPER_TEST_THOROUGH` kills at all of them.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::chance::{is_thorough, seed};
use crate::support::gate::{Gate, Moment};
use crate::support::gateway::{Answer, Gateway, PATIENCE, text};
use crate::support::history::{Line, joined, transcript};
use crate::support::recording_proxy::{DatabaseTap, HttpTap, Steps};
use crate::support::scene::{Backend, Protocol, Scene};

/// Number of lanes that run side by side. Each has a separate database and upstream, and every
/// `LANES`-th step.
const LANES: usize = 2;
/// Number of first steps that are always tried. Some operations have no more.
const FIRST_STEPS: usize = 4;
/// Of later steps, one of this many is tried. It has no divisor in common with `LANES`, so that each
/// lane tries some.
const SHARE: u64 = 5;
/// Upper limit of steps; no operation has this many.
const MANY: usize = 400;
/// A time longer than any back-off of the janitor and any wait for an intent.
const LONG: Duration = Duration::from_hours(3);
/// The session lasts longer than a test, so that no step belongs to its renewal.
const SETTINGS: &str = "[replica]\nsession_ttl = \"30s\"\n[runs]\nsettle_timeout = \"2s\"\n\
     [janitor]\ninterval = \"1h\"\ncalls_per_second = 100000\n";
const UPSTREAM: &str = "lock_window = \"50ms\"\n";

/// The operation that is killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Operation {
    DeleteConversation,
    DeleteToArchive,
    DeleteUser,
    /// A rollover of an idle thread.
    RollOver,
    /// A rollover while one run awaits tool outputs and another one is queued.
    RollOverLater,
    /// A rollover by a message to a full thread.
    RollOverByMessage,
    /// A message whose run fails at the upstream and is repeated.
    RepeatFailedRun,
}

use Operation::{
    DeleteConversation, DeleteToArchive, DeleteUser, RepeatFailedRun, RollOver, RollOverByMessage,
    RollOverLater,
};

/// Makes a test of each operation for a protocol and a store.
macro_rules! kills {
    ($($module:ident $protocol:ident $backend:ident [$($name:ident $operation:ident),+ $(,)?])+) => {
        $(mod $module {
            use crate::support::scene::{Backend, Protocol};
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    super::at_each_step(Protocol::$protocol, Backend::$backend, super::$operation).await;
                }
            )+
        })+
    };
}

kills! {
    responses_postgres Responses Postgres [
        killed_conversation_deletion_is_finished DeleteConversation,
        killed_archiving_deletion_is_finished DeleteToArchive,
        killed_user_deletion_is_finished DeleteUser,
        killed_rollover_loses_no_message RollOver,
        killed_deferred_rollover_loses_no_message RollOverLater,
        killed_automatic_rollover_loses_no_message RollOverByMessage,
        killed_repetition_of_failed_run_is_answered_once RepeatFailedRun,
    ]
    assistants_postgres Assistants Postgres [
        killed_conversation_deletion_is_finished DeleteConversation,
        killed_archiving_deletion_is_finished DeleteToArchive,
        killed_deferred_rollover_loses_no_message RollOverLater,
        killed_automatic_rollover_loses_no_message RollOverByMessage,
        killed_repetition_of_failed_run_is_answered_once RepeatFailedRun,
    ]
    responses_sqlite Responses Sqlite [
        killed_conversation_deletion_is_finished DeleteConversation,
        killed_archiving_deletion_is_finished DeleteToArchive,
        killed_automatic_rollover_loses_no_message RollOverByMessage,
    ]
    assistants_sqlite Assistants Sqlite [
        killed_conversation_deletion_is_finished DeleteConversation,
        killed_automatic_rollover_loses_no_message RollOverByMessage,
    ]
    chain_postgres Chain Postgres [
        killed_conversation_deletion_is_finished DeleteConversation,
        killed_automatic_rollover_loses_no_message RollOverByMessage,
    ]
}

async fn at_each_step(protocol: Protocol, backend: Backend, operation: Operation) {
    let begun = Instant::now();
    let lanes = (0..LANES).map(|lane| async move {
        World::new(protocol, backend, operation)
            .await
            .lane(lane)
            .await
    });
    let kills = join_all(lanes).await;
    assert!(
        kills.iter().any(|(kills, _)| *kills > 0),
        "no step was reached"
    );
    println!(
        "{operation:?}, {protocol:?}, {backend:?}: {} kills at {} steps in {:.1?}",
        kills.iter().map(|(kills, _)| kills).sum::<usize>(),
        kills.iter().map(|(_, steps)| steps).max().unwrap(),
        begun.elapsed(),
    );
}

impl Operation {
    /// Returns the moments at which to stop the `n`-th step. For the many steps of a deletion,
    /// the moment before one step equals the moment after the step before it. So the moments
    /// alternate, except in a thorough run.
    fn moments(self, n: usize) -> &'static [Moment] {
        let is_long = matches!(self, DeleteConversation | DeleteToArchive | DeleteUser);
        match n % 2 {
            _ if is_thorough() || !is_long => &[Moment::Before, Moment::After],
            0 => &[Moment::After],
            _ => &[Moment::Before],
        }
    }
}

/// A text that is printed if the test fails.
struct FailureNote(String);

impl Drop for FailureNote {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.0);
        }
    }
}

/// A database and an upstream, and proxies to both that a gate can stop.
struct World {
    scene: Scene,
    operation: Operation,
    gate: Gate,
    config: String,
    _tap: Option<DatabaseTap>,
    _upstream: HttpTap,
}

/// The conversation on which the operation works.
struct Story {
    /// Prefix of every text, and the key of the user.
    word: String,
    scope: String,
    /// The user's messages, in order.
    said: Vec<String>,
    /// The run that awaits tool outputs.
    waiting: Option<Value>,
    /// Number of deletions before the operation.
    deletions: i64,
    runs: i64,
}

impl World {
    async fn new(protocol: Protocol, backend: Backend, operation: Operation) -> Self {
        let scene = Scene::new(protocol, backend).await;
        let gate = Gate::default();
        // Reads and uncommitted statements change nothing. So a kill at one of them equals a kill
        // at an earlier step.
        let steps = if is_thorough() {
            Steps::All
        } else {
            Steps::Changes
        };
        let upstream = HttpTap::gated(&scene.upstream_url, &gate, steps).await;
        // For chains the upstream decides, so the database is not tapped. SQLite has no
        // connection to tap.
        let tap = match (backend, protocol) {
            (Backend::Postgres, Protocol::Responses | Protocol::Assistants) => {
                Some(DatabaseTap::gated(&scene.database.url(), &gate, steps).await)
            }
            _ => None,
        };
        let special = match operation {
            DeleteConversation | DeleteToArchive | DeleteUser => {
                "[archive]\nkeep_upstream = true\n"
            }
            RepeatFailedRun => "",
            RollOver | RollOverLater => "[threads]\ncarry_over_messages = 2\n",
            RollOverByMessage => "[threads]\ncarry_over_messages = 2\nmax_messages = 4\n",
        };
        let mut config = scene
            .config_with(&format!("{SETTINGS}{special}"), UPSTREAM)
            .replace(&scene.upstream_url, &upstream.url);
        if let Some(tap) = &tap {
            config = config.replace(&scene.database.url(), &tap.url);
        }
        Self {
            scene,
            operation,
            gate,
            config,
            _tap: tap,
            _upstream: upstream,
        }
    }

    /// Kills at the steps of one lane until the operation has no further step. Returns the number
    /// of kills and the last step.
    async fn lane(&self, lane: usize) -> (usize, usize) {
        let seed = seed();
        let is_tried =
            |n: &usize| is_thorough() || *n <= FIRST_STEPS || *n as u64 % SHARE == seed % SHARE;
        let mut gateway = Gateway::start(&self.config).await;
        let mut kills = 0;
        for n in (lane + 1..MANY).step_by(LANES).filter(is_tried) {
            let mut reached = false;
            for &moment in self.operation.moments(n) {
                let mut story = Story::new(n, moment);
                story.prepare(&gateway, self.operation).await;
                story.deletions = self
                    .scene
                    .database
                    .number("SELECT count(*) FROM deletions")
                    .await;
                story.runs = self
                    .scene
                    .database
                    .number("SELECT count(*) FROM runs")
                    .await;
                if self.operation == RepeatFailedRun {
                    let fault = "fail=server_error retry_after=0.05";
                    self.scene.fault("start", fault, 1);
                }
                self.gate.set(n, moment);
                let operation = story.operate(&gateway, self.operation);
                let answered = tokio::select! {
                    answered = operation => Some(answered),
                    () = self.gate.caught() => None,
                    () = tokio::time::sleep(PATIENCE) => panic!("step {n} was not reached in time"),
                };
                gateway.kill();
                let steps = self.gate.open();
                let killed =
                    FailureNote(format!("{}: {moment:?} step {n} of {steps:#?}", story.word));
                reached |= answered.is_none();
                kills += usize::from(answered.is_none());
                // The dead process's work may be taken over at once.
                self.scene.database.execute("DELETE FROM replicas").await;
                self.scene.database.age_due_times(LONG).await;
                gateway = Gateway::start(&self.config).await;
                story.check(self, &gateway, answered).await;
                if self.operation == RollOverByMessage {
                    story.check_deletable(self, &gateway, &steps).await;
                }
                drop(killed);
            }
            if !reached {
                return (kills, n);
            }
        }
        panic!("the operation never ended");
    }

    /// Returns the newest receipt, once its deletion is finished.
    async fn receipt(&self, gateway: &Gateway) -> Value {
        let id = match self.scene.backend {
            Backend::Postgres => "replace(id::text, '-', '')",
            Backend::Sqlite => "lower(hex(id))",
        };
        let newest = format!("SELECT {id} FROM deletions ORDER BY id DESC LIMIT 1");
        let id = self.scene.database.texts(&newest).await.remove(0);
        let place = format!("/v1/deletions/del_{id}");
        self.until(gateway, "the deletion is finished", async || {
            let receipt = gateway.get(&place).await.ok();
            (receipt["status"] == "completed").then_some(receipt)
        })
        .await
    }

    /// Starts passes of the janitor until `wanted` returns a value.
    async fn until<T>(
        &self,
        gateway: &Gateway,
        what: &str,
        wanted: impl AsyncFn() -> Option<T>,
    ) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = wanted().await {
                return found;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "this did not happen in time: {what}"
            );
            self.scene.database.age_due_times(LONG).await;
            gateway
                .send(gateway.request(Method::POST, "/v1/admin/cleanup"))
                .await
                .ok();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Story {
    fn new(n: usize, moment: Moment) -> Self {
        let word = format!(
            "word{n}{}",
            if moment == Moment::Before { 'b' } else { 'a' }
        );
        let scope = format!("/v1/users/{word}");
        Self {
            word,
            scope,
            said: Vec::new(),
            waiting: None,
            deletions: 0,
            runs: 0,
        }
    }

    /// Returns a text that is unique to this conversation.
    fn text(&self, what: &str) -> String {
        format!("{}: {what}.", self.word)
    }

    async fn say(&mut self, gateway: &Gateway, what: &str) -> Value {
        let text = self.text(what);
        self.said.push(text.clone());
        gateway.say(&self.scope, &text).await
    }

    /// Sends a message that the model answers with a function call.
    async fn ask(&mut self, gateway: &Gateway, what: &str) -> Value {
        let text = self.text(what);
        self.said.push(text.clone());
        let asked = gateway
            .say(&self.scope, &format!("{text} [[sim: tool=look]]"))
            .await;
        assert_eq!(asked["run"]["status"], "requires_action", "{asked:#}");
        asked
    }

    async fn give(&self, gateway: &Gateway, asked: &Value) -> Answer {
        let path = format!(
            "{}/runs/{}/tool_outputs",
            self.scope,
            asked["run"]["id"].as_str().unwrap()
        );
        let call = &asked["run"]["required_action"]["tool_calls"][0]["id"];
        let outputs = json!([{"tool_call_id": call, "output": self.text("seen")}]);
        gateway.post(&path, &json!({"tool_outputs": outputs})).await
    }

    /// Makes a conversation of two generations. Where it matters, one run awaits tool outputs and
    /// another one is queued.
    async fn prepare(&mut self, gateway: &Gateway, operation: Operation) {
        self.say(gateway, "one").await;
        if operation == RepeatFailedRun {
            return;
        }
        let asked = self.ask(gateway, "two").await;
        self.give(gateway, &asked).await.ok();
        if operation != RollOverByMessage {
            self.roll_over(gateway).await.ok();
        }
        let body = json!({"content": self.text("three")});
        self.said.push(self.text("three"));
        let request = gateway.request(Method::POST, &format!("{}/messages", self.scope));
        let key = format!("key-of-{}", self.word);
        gateway
            .send(request.header("idempotency-key", key).json(&body))
            .await
            .ok();
        match operation {
            RollOver | RollOverByMessage => {
                self.say(gateway, "four").await;
            }
            DeleteUser => {
                gateway
                    .say(
                        &format!("{}/sessions/s1", self.scope),
                        &self.text("elsewhere"),
                    )
                    .await;
                self.busy(gateway).await;
            }
            DeleteConversation | DeleteToArchive | RollOverLater => self.busy(gateway).await,
            RepeatFailedRun => {}
        }
    }

    async fn busy(&mut self, gateway: &Gateway) {
        self.waiting = Some(self.ask(gateway, "four").await);
        self.said.push(self.text("five"));
        let request = gateway.request(Method::POST, &format!("{}/messages", self.scope));
        let queued = request
            .header("prefer", "respond-async")
            .json(&json!({"content": self.text("five")}));
        assert_eq!(gateway.send(queued).await.status, StatusCode::ACCEPTED);
    }

    async fn roll_over(&self, gateway: &Gateway) -> Answer {
        gateway
            .send(gateway.request(Method::POST, &format!("{}/thread/rollover", self.scope)))
            .await
    }

    async fn delete(&self, gateway: &Gateway, operation: Operation) -> Answer {
        let path = match operation {
            DeleteUser => self.scope.clone(),
            DeleteToArchive => format!("{}/thread?archive=true", self.scope),
            _ => format!("{}/thread", self.scope),
        };
        gateway.send(gateway.request(Method::DELETE, &path)).await
    }

    /// Performs the operation, from its first request until all its work is done.
    async fn operate(&self, gateway: &Gateway, operation: Operation) {
        match operation {
            DeleteConversation | DeleteToArchive | DeleteUser => {
                assert!(self.delete(gateway, operation).await.status.is_success());
            }
            RollOver => {
                self.roll_over(gateway).await.ok();
            }
            RollOverLater => {
                assert_eq!(self.roll_over(gateway).await.status, StatusCode::ACCEPTED);
                self.give(gateway, self.waiting.as_ref().unwrap())
                    .await
                    .ok();
                let runs = format!("{}/runs", self.scope);
                let ended = |answer: &Answer| answer.body["data"][0]["finished_at"].is_string();
                gateway
                    .until(&runs, |answer| {
                        answer.status == StatusCode::OK && ended(answer)
                    })
                    .await;
            }
            RollOverByMessage => {
                gateway.say(&self.scope, &self.text("five")).await;
            }
            RepeatFailedRun => {
                gateway.say(&self.scope, &self.text("two")).await;
            }
        }
    }

    async fn check(&mut self, world: &World, gateway: &Gateway, answered: Option<()>) {
        match world.operation {
            DeleteConversation | DeleteToArchive | DeleteUser => {
                self.check_deleted(world, gateway, answered.is_some()).await;
            }
            RollOver | RollOverLater | RollOverByMessage => {
                self.check_rolled_over(world, gateway, answered.is_some())
                    .await;
            }
            RepeatFailedRun => {
                self.check_repeated(world, gateway, answered.is_some())
                    .await;
            }
        }
    }

    /// Checks that the message has one answer, here and at the upstream, although its first run
    /// failed there.
    async fn check_repeated(&mut self, world: &World, gateway: &Gateway, answered: bool) {
        let path = format!("{}/thread", self.scope);
        gateway
            .until(&path, |answer| answer.body["state"] == "idle")
            .await;
        world.scene.simulator.clear_faults();
        let admitted = world
            .scene
            .database
            .number("SELECT count(*) FROM runs")
            .await
            > self.runs;
        assert!(admitted || !answered, "an acknowledged run is recorded");
        if admitted {
            self.said.push(self.text("two"));
            let runs = gateway.get(&format!("{}/runs", self.scope)).await.ok();
            assert_eq!(runs["data"][0]["status"], "completed", "{runs:#}");
            let run = runs["data"][0]["id"].as_str().unwrap();
            let upstream = world.scene.simulator.runs();
            let completed = upstream.iter().filter(|it| {
                it.metadata["threadkeeper_run"] == run && it.status.as_deref() == Some("completed")
            });
            assert_eq!(completed.count(), 1, "{run} has one answer: {upstream:#?}");
        }
        self.say(gateway, "six").await;
        assert_eq!(
            self.user_messages(gateway).await,
            self.said,
            "each message is there once"
        );
        let thread = gateway.get(&path).await.ok();
        let held = world
            .scene
            .simulator
            .thread_history(thread["upstream_thread_id"].as_str().unwrap());
        assert_eq!(
            joined(held.into_iter()),
            transcript(gateway, &self.scope).await,
            "transcript and upstream thread agree"
        );
    }

    /// Checks that a recorded deletion is finished, and that an unrecorded one has changed
    /// nothing.
    async fn check_deleted(&mut self, world: &World, gateway: &Gateway, answered: bool) {
        let is_begun = world
            .scene
            .database
            .number("SELECT count(*) FROM deletions")
            .await
            > self.deletions;
        assert!(
            is_begun || !answered,
            "a deletion that was acknowledged is recorded"
        );
        if !is_begun {
            self.cancel_all(gateway).await;
            assert_eq!(
                self.user_messages(gateway).await,
                self.said,
                "each message is there once"
            );
            self.say(gateway, "six").await;
            assert!(
                self.delete(gateway, world.operation)
                    .await
                    .status
                    .is_success()
            );
        }
        let receipt = world.receipt(gateway).await;
        let threads = receipt["threads"]["data"].as_array().unwrap();
        let expected = match world.operation {
            DeleteToArchive => 1,
            DeleteUser => 3,
            _ => 2,
        };
        assert_eq!(
            (receipt["threads_pending"].as_i64(), threads.len()),
            (Some(0), expected),
            "{receipt:#}"
        );
        for thread in threads {
            let outcome = thread["upstream_outcome"].as_str().unwrap();
            assert!(
                ["deleted", "already_gone"].contains(&outcome),
                "{receipt:#}"
            );
        }
        if world.operation == DeleteToArchive {
            self.cancel_all(gateway).await;
            assert_eq!(
                self.user_messages(gateway).await,
                self.said,
                "the transcript is kept"
            );
            for gone in ["three", "four", "five", "six"] {
                assert_eq!(world.scene.simulator.holds_text(&self.text(gone)), [""; 0]);
            }
        } else {
            assert_eq!(
                world.scene.database.holding(&self.word).await,
                [""; 0],
                "the database still has texts of the conversation"
            );
            assert_eq!(
                world.scene.simulator.holds_text(&self.word),
                [""; 0],
                "the upstream still has texts of the conversation"
            );
        }
        assert_eq!(world.scene.simulator.leaked_items(), [""; 0]);
        let fresh = gateway.say(&self.scope, &self.text("anew")).await;
        assert!(
            text(&fresh["message"]).contains("This is turn 1 of"),
            "{fresh:#}"
        );
        let id = fresh["thread"]["id"].as_str().unwrap();
        let messages = gateway
            .get(&format!("/v1/threads/{id}/messages"))
            .await
            .ok();
        assert_eq!(
            messages["data"].as_array().unwrap().len(),
            2,
            "{messages:#}"
        );
    }

    /// Checks that no message is lost or doubled by the rollover, and that the model knows the
    /// carried-over ones.
    async fn check_rolled_over(&mut self, world: &World, gateway: &Gateway, answered: bool) {
        self.cancel_all(gateway).await;
        if world.operation == RollOverByMessage {
            let admitted = world
                .scene
                .database
                .number("SELECT count(*) FROM runs")
                .await
                > self.runs;
            assert!(
                admitted || !answered,
                "a rollover that was acknowledged is recorded"
            );
            if admitted {
                self.said.push(self.text("five"));
            }
        }
        let earlier = if world.operation == RollOverLater {
            3
        } else {
            4
        };
        let count = format!(
            "SELECT count(*) FROM threads WHERE user_key = '{}' AND lifecycle = 'current'",
            self.word
        );
        self.say(gateway, "six").await;
        self.say(gateway, "seven").await;
        assert_eq!(
            world.scene.database.number(&count).await,
            1,
            "exactly one thread is current"
        );
        assert_eq!(
            self.user_messages(gateway).await,
            self.said,
            "each message is there once"
        );

        let all = self.messages(gateway).await;
        for said in &self.said[..earlier] {
            let replies = all
                .iter()
                .filter(|m| m["role"] == "assistant" && whole(m).contains(said.as_str()));
            assert_eq!(replies.count(), 1, "{said}: {all:#?}");
        }
        let thread = gateway.get(&format!("{}/thread", self.scope)).await.ok();
        let before = |message: &&Value| message["thread_id"] == thread["previous_thread"];
        let known = all
            .iter()
            .filter(before)
            .filter(|message| message["visible_to_model"] == true);
        let known: Vec<Line> = known
            .map(|message| (message["role"].as_str().unwrap().to_owned(), whole(message)))
            .collect();
        let mut expected = known[known.len().saturating_sub(2)..].to_vec();
        expected.extend(transcript(gateway, &self.scope).await);
        let held = world
            .scene
            .simulator
            .thread_history(thread["upstream_thread_id"].as_str().unwrap());
        assert_eq!(
            joined(held.into_iter()),
            joined(expected.into_iter()),
            "the model knows the carried-over messages and the later ones"
        );

        // The upstream does not have the messages before them any more.
        let one = self.text("one");
        world
            .until(
                gateway,
                "the upstream copy of the old thread is gone",
                async || {
                    world
                        .scene
                        .simulator
                        .holds_text(&one)
                        .is_empty()
                        .then_some(())
                },
            )
            .await;
    }

    /// Checks that a deletion finds whatever a kill left. There are two exceptions, which the
    /// receipt counts: an upstream thread and a response whose id was never recorded.
    async fn check_deletable(&self, world: &World, gateway: &Gateway, steps: &[String]) {
        assert!(
            self.delete(gateway, DeleteConversation)
                .await
                .status
                .is_success()
        );
        let receipt = world.receipt(gateway).await;
        assert_eq!(
            world.scene.database.holding(&self.word).await,
            [""; 0],
            "the database still has texts of the conversation"
        );
        let threads = receipt["threads"]["data"].as_array().unwrap().iter();
        let unknown: i64 = threads
            .map(|thread| thread["upstream_unknown"].as_i64().unwrap())
            .sum();
        let made = |what: &str| steps.iter().any(|step| step == what);
        let made_thread = made("POST /v1/threads") || made("POST /v1/conversations");
        let left = world.scene.simulator.holds_text(&self.word);
        // If the run was cancelled before its successor's response was answered, that response's
        // id is not recorded either.
        let excused = left
            .iter()
            .all(|place| place.contains("response ") || made_thread);
        // Entries for the content of a listed thing do not count.
        let things = left.iter().filter(|place| !place.contains(" of ")).count();
        let told = things <= usize::try_from(unknown).unwrap();
        assert!(excused && told, "{left:#?} is left upstream: {receipt:#}");
    }

    /// Cancels all unfinished runs.
    async fn cancel_all(&self, gateway: &Gateway) {
        let path = format!("{}/thread/cancel?which=all", self.scope);
        gateway.send(gateway.request(Method::POST, &path)).await;
        let idle = |answer: &Answer| {
            answer.status == StatusCode::NOT_FOUND || answer.body["state"] == "idle"
        };
        gateway.until(&format!("{}/thread", self.scope), idle).await;
    }

    /// Returns all messages of the conversation, archived ones too, oldest first.
    async fn messages(&self, gateway: &Gateway) -> Vec<Value> {
        let path = format!("{}/messages?archived=true&order=asc&limit=100", self.scope);
        let page = gateway.get(&path).await.ok();
        assert_eq!(page["has_more"], false);
        page["data"].as_array().unwrap().clone()
    }

    /// Returns the user's messages without their directives.
    async fn user_messages(&self, gateway: &Gateway) -> Vec<String> {
        let all = self.messages(gateway).await;
        let users = all.iter().filter(|message| message["role"] == "user");
        users
            .map(|message| text(message).split(" [[").next().unwrap().to_owned())
            .collect()
    }
}

/// Returns the whole text of a message, without its calls of tools.
fn whole(message: &Value) -> String {
    let parts = message["content"].as_array().unwrap().iter();
    parts.filter_map(|part| part["text"].as_str()).collect()
}
