//! kill -9 at each step of a deletion and of a rollover: at each question to the database and each request to the upstream,
//! before it has arrived or before its answer has. Whoever starts next finishes what was begun. Each run of the suite kills
//! at the first of these steps and at every third later one; the seed (`THREADKEEPER_TEST_SEED`) chooses which.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::chance::{is_thorough, seed};
use crate::support::gate::{Gate, Moment};
use crate::support::gateway::{Answer, Gateway, PATIENCE, text};
use crate::support::history::{Line, transcript};
use crate::support::recording_proxy::{DatabaseTap, HttpTap, Steps};
use crate::support::scene::{Backend, Protocol, Scene};

/// Side by side, each with a database and an upstream of its own, each with every so manieth step.
const LANES: usize = 2;
/// All of these are tried, since some operations have no more.
const FIRST_STEPS: usize = 4;
/// No operation has so many steps.
const MANY: usize = 400;
/// Longer than any look is put off or an intent waited for.
const LONG: Duration = Duration::from_hours(3);
/// The session is longer than any kill takes, so that nothing but the operation is stopped.
const SETTINGS: &str = "[replica]\nsession_ttl = \"30s\"\n[runs]\nsettle_timeout = \"2s\"\n\
     [janitor]\ninterval = \"1h\"\ncalls_per_second = 100000\n";
const UPSTREAM: &str = "lock_window = \"50ms\"\n";

/// What is asked for, and killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Operation {
    DeleteConversation,
    DeleteToArchive,
    DeleteUser,
    /// On an idle thread.
    RollOver,
    /// While a run waits for its outputs and another one for its turn.
    RollOverLater,
    /// By a message to a full thread.
    RollOverByMessage,
}

use Operation::{
    DeleteConversation, DeleteToArchive, DeleteUser, RollOver, RollOverByMessage, RollOverLater,
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
    ]
    assistants_postgres Assistants Postgres [
        killed_conversation_deletion_is_finished DeleteConversation,
        killed_archiving_deletion_is_finished DeleteToArchive,
        killed_deferred_rollover_loses_no_message RollOverLater,
        killed_automatic_rollover_loses_no_message RollOverByMessage,
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
        "nothing was killed"
    );
    println!(
        "{operation:?}, {protocol:?}, {backend:?}: {} kills at {} steps in {:.1?}",
        kills.iter().map(|(kills, _)| kills).sum::<usize>(),
        kills.iter().map(|(_, steps)| steps).max().unwrap(),
        begun.elapsed(),
    );
}

impl Operation {
    /// When to stop the `n`-th step. Of the many of a deletion, what comes before one is what comes after the last one,
    /// where one follows the other; so the moments take turns, unless all is wanted.
    fn moments(self, n: usize) -> &'static [Moment] {
        let is_long = matches!(self, DeleteConversation | DeleteToArchive | DeleteUser);
        match n % 2 {
            _ if is_thorough() || !is_long => &[Moment::Before, Moment::After],
            0 => &[Moment::After],
            _ => &[Moment::Before],
        }
    }
}

/// What is told if the test fails.
struct Told(String);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.0);
        }
    }
}

/// A database and an upstream, and ways to both that can be stopped.
struct World {
    scene: Scene,
    operation: Operation,
    gate: Gate,
    config: String,
    _tap: Option<DatabaseTap>,
    _upstream: HttpTap,
}

/// A conversation to which it happens.
struct Story {
    /// Begins every text, and is the user.
    word: String,
    scope: String,
    /// What the user said, in order.
    said: Vec<String>,
    /// The run that waits for outputs.
    waiting: Option<Value>,
    /// Recorded before the operation.
    deletions: i64,
    runs: i64,
}

impl World {
    async fn new(protocol: Protocol, backend: Backend, operation: Operation) -> Self {
        let scene = Scene::new(protocol, backend).await;
        let gate = Gate::default();
        // What reads, or is not committed, leaves things as they were, so a kill there is one that was tried before.
        let steps = if is_thorough() {
            Steps::All
        } else {
            Steps::Changes
        };
        let upstream = HttpTap::gated(&scene.upstream_url, &gate, steps).await;
        // A chain is a matter of the upstream; of SQLite nothing passes a wire.
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

    /// Kills at the steps of one lane, until the operation has no such step. How many kills, and the last step.
    async fn lane(&self, lane: usize) -> (usize, usize) {
        let seed = seed();
        let is_tried = |n: &usize| is_thorough() || *n <= FIRST_STEPS || *n as u64 % 3 == seed % 3;
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
                self.gate.set(n, moment);
                let operation = story.operate(&gateway, self.operation);
                let answered = tokio::select! {
                    answered = operation => Some(answered),
                    () = self.gate.caught() => None,
                    () = tokio::time::sleep(PATIENCE) => panic!("step {n} never came"),
                };
                gateway.kill();
                let steps = self.gate.open();
                let killed = Told(format!("{}: {moment:?} step {n} of {steps:#?}", story.word));
                reached |= answered.is_none();
                kills += usize::from(answered.is_none());
                // So that what the dead one had is anybody's at once.
                self.scene.database.execute("DELETE FROM replicas").await;
                self.scene.database.age_looks(LONG).await;
                gateway = Gateway::start(&self.config).await;
                story.check(self, &gateway, answered).await;
                if self.operation == RollOverByMessage {
                    story.can_be_deleted(self, &gateway, &steps).await;
                }
                drop(killed);
            }
            if !reached {
                return (kills, n);
            }
        }
        panic!("the operation never ends");
    }

    /// The newest receipt, once its deletion is finished.
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

    /// Has the janitor look until something is as wanted.
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
            assert!(start.elapsed() < PATIENCE, "it never came to this: {what}");
            self.scene.database.age_looks(LONG).await;
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

    /// A text that nobody else says.
    fn text(&self, what: &str) -> String {
        format!("{}: {what}.", self.word)
    }

    async fn say(&mut self, gateway: &Gateway, what: &str) -> Value {
        let text = self.text(what);
        self.said.push(text.clone());
        gateway.say(&self.scope, &text).await
    }

    /// Says something that is answered with a function call.
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

    /// Two generations, and where it makes a difference a run that waits for outputs and one behind it.
    async fn prepare(&mut self, gateway: &Gateway, operation: Operation) {
        self.say(gateway, "one").await;
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

    /// What is killed, from its first request to the end of all that this leads to.
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
        }
    }

    async fn check(&mut self, world: &World, gateway: &Gateway, answered: Option<()>) {
        match world.operation {
            DeleteConversation | DeleteToArchive | DeleteUser => {
                self.is_deleted(world, gateway, answered.is_some()).await;
            }
            RollOver | RollOverLater | RollOverByMessage => {
                self.is_rolled_over(world, gateway, answered.is_some())
                    .await;
            }
        }
    }

    /// What was begun is finished; what was not has changed nothing.
    async fn is_deleted(&mut self, world: &World, gateway: &Gateway, answered: bool) {
        let is_begun = world
            .scene
            .database
            .number("SELECT count(*) FROM deletions")
            .await
            > self.deletions;
        assert!(is_begun || !answered, "answered, and nothing is written");
        if !is_begun {
            self.cancel_all(gateway).await;
            assert_eq!(
                self.heard(gateway).await,
                self.said,
                "nothing is missing, nothing is there twice"
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
            assert_eq!(self.heard(gateway).await, self.said, "the transcript stays");
            for gone in ["three", "four", "five", "six"] {
                assert_eq!(world.scene.simulator.holds_text(&self.text(gone)), [""; 0]);
            }
        } else {
            assert_eq!(
                world.scene.database.holding(&self.word).await,
                [""; 0],
                "in the database"
            );
            assert_eq!(
                world.scene.simulator.holds_text(&self.word),
                [""; 0],
                "at the upstream"
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

    /// Nothing is lost or doubled across the seam, and the model knows what was carried over.
    async fn is_rolled_over(&mut self, world: &World, gateway: &Gateway, answered: bool) {
        self.cancel_all(gateway).await;
        if world.operation == RollOverByMessage {
            let admitted = world
                .scene
                .database
                .number("SELECT count(*) FROM runs")
                .await
                > self.runs;
            assert!(admitted || !answered, "answered, and nothing is written");
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
            "one thread is current"
        );
        assert_eq!(
            self.heard(gateway).await,
            self.said,
            "nothing is missing, nothing is there twice"
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
            joined(&held),
            joined(&expected),
            "the model knows what was carried over and said since"
        );

        // What was before that is not at the upstream any more.
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

    /// Whatever a kill left, a deletion finds. But for what was made at the upstream and whose id nobody has recorded, an
    /// upstream thread or the response of a run that was killed at work: the receipt tells of these.
    async fn can_be_deleted(&self, world: &World, gateway: &Gateway, steps: &[String]) {
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
            "in the database"
        );
        let threads = receipt["threads"]["data"].as_array().unwrap().iter();
        let unknown: i64 = threads
            .map(|thread| thread["upstream_unknown"].as_i64().unwrap())
            .sum();
        let made = |what: &str| steps.iter().any(|step| step == what);
        let made_thread = made("POST /v1/threads") || made("POST /v1/conversations");
        let left = world.scene.simulator.holds_text(&self.word);
        // A response may also be one of who went on with the run, if that was cancelled before it had answered.
        let excused = left
            .iter()
            .all(|place| place.contains("response ") || made_thread);
        // Each with what is in it.
        let things = left.iter().filter(|place| !place.contains(" of ")).count();
        let told = things <= usize::try_from(unknown).unwrap();
        assert!(
            excused && told,
            "{left:#?} is left at the upstream: {receipt:#}"
        );
    }

    /// Ends what still waits for somebody.
    async fn cancel_all(&self, gateway: &Gateway) {
        let path = format!("{}/thread/cancel?which=all", self.scope);
        gateway.send(gateway.request(Method::POST, &path)).await;
        let idle = |answer: &Answer| {
            answer.status == StatusCode::NOT_FOUND || answer.body["state"] == "idle"
        };
        gateway.until(&format!("{}/thread", self.scope), idle).await;
    }

    /// All messages that the conversation ever had, oldest first.
    async fn messages(&self, gateway: &Gateway) -> Vec<Value> {
        let path = format!("{}/messages?archived=true&order=asc&limit=100", self.scope);
        let page = gateway.get(&path).await.ok();
        assert_eq!(page["has_more"], false);
        page["data"].as_array().unwrap().clone()
    }

    /// What the user said, as it is told, without directives.
    async fn heard(&self, gateway: &Gateway) -> Vec<String> {
        let all = self.messages(gateway).await;
        let users = all.iter().filter(|message| message["role"] == "user");
        users
            .map(|message| text(message).split(" [[").next().unwrap().to_owned())
            .collect()
    }
}

/// All text of a message.
fn whole(message: &Value) -> String {
    let parts = message["content"].as_array().unwrap().iter();
    parts.map(|part| part["text"].as_str().unwrap()).collect()
}

/// Lines without directives, in which a reply in several parts is one.
fn joined(lines: &[Line]) -> Vec<Line> {
    let mut all: Vec<Line> = Vec::new();
    for (role, text) in lines {
        match all.last_mut() {
            Some((last, before)) if last == role && role == "assistant" => before.push_str(text),
            _ => all.push((role.clone(), text.clone())),
        }
    }
    all
}
