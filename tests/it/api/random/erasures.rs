//! Deletions at random moments, beside messages of all strategies, rollovers and creations of
//! upstream threads. Nothing acknowledged before a deletion may exist afterwards, and no upstream
//! thread may be left without an owner.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future::{join_all, join3};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use reqwest::{Method, StatusCode};
use serde_json::json;
use threadkeeper::simulator::SimulatorConfig;
use tokio::time::sleep;

use crate::support::chance::{seed, share_of};
use crate::support::gateway::{Gateway, PATIENCE};
use crate::support::scene::{Protocol, Scene, on_each_protocol_by_chance};

on_each_protocol_by_chance!(random_erasures_remove_every_acknowledged_message);

const USERS: usize = 6;
const ROUNDS: usize = 12;
/// Settings with which a thread is full soon, and its successor begins with the last messages.
const SETTINGS: &str = "[threads]\nmax_messages = 5\ncarry_over_messages = 3\n[runs]\nsettle_timeout = \"2s\"\n\
                        [janitor]\ninterval = \"50ms\"\ncalls_per_second = 10000\n";
const UPSTREAM: &str = "lock_window = \"50ms\"\nbreaker_min_requests = 0\n";
const STRATEGIES: [&str; 7] = [
    "enqueue",
    "enqueue",
    "merge",
    "merge",
    "interrupt",
    "rollback",
    "reject",
];
const TURNS: [&str; 5] = [
    "",
    "tokens=10 rate=2ms",
    "tokens=40 rate=2ms",
    "tool=f",
    "fail",
];

/// One user's conversation.
struct User<'a> {
    scene: &'a Scene,
    gateway: &'a Gateway,
    number: usize,
    rng: StdRng,
    said: usize,
    /// Acknowledged texts that are not erased yet.
    kept: Vec<String>,
    erased: Vec<String>,
}

async fn random_erasures_remove_every_acknowledged_message(scene: Scene) {
    // Upstream threads whose creation was never acknowledged can be found only on a server that
    // lists threads.
    let config = SimulatorConfig {
        list_threads: true,
        ..SimulatorConfig::default()
    };
    let scene = Scene::with(scene.protocol, scene.backend, config).await;
    let seed = seed();
    let gateway = scene.gateway_both(SETTINGS, UPSTREAM).await;
    let users = (0..USERS).map(|number| {
        let rng = StdRng::seed_from_u64(seed.wrapping_add(number as u64));
        let user = User {
            scene: &scene,
            gateway: &gateway,
            number,
            rng,
            said: 0,
            kept: Vec::new(),
            erased: Vec::new(),
        };
        user.live()
    });
    let erased: Vec<String> = join_all(users).await.concat();
    scene.simulator.clear_faults();
    assert!(
        erased.len() > USERS * share_of(ROUNDS) / 2,
        "{} messages were erased: this shows little",
        erased.len()
    );

    wait_until_done(&scene).await;
    let mut everything = scene.database.everything().await;
    // Database files keep deleted bytes until they are overwritten.
    everything.retain(|(place, _)| !place.contains('/'));
    for text in &erased {
        let held = |value: &[u8]| {
            value
                .windows(text.len())
                .any(|part| part == text.as_bytes())
        };
        let here: Vec<&String> = everything
            .iter()
            .filter(|(_, value)| held(value))
            .map(|(place, _)| place)
            .collect();
        assert!(here.is_empty(), "{text} is still in {here:?}");
        // A response that was cut off before its id arrived cannot be deleted by anybody. The
        // receipt says so.
        let there = scene.simulator.holds_text(text);
        let there: Vec<&String> = there
            .iter()
            .filter(|place| !place.contains("response"))
            .collect();
        assert!(there.is_empty(), "{text} is still upstream: {there:?}");
    }
    if scene.protocol != Protocol::Chain {
        let named = "SELECT upstream_thread_id FROM threads WHERE upstream_thread_id IS NOT NULL";
        let named: BTreeSet<String> = scene.database.texts(named).await.into_iter().collect();
        let there: BTreeSet<String> = scene.upstream_threads().into_iter().collect();
        assert_eq!(
            there.difference(&named).collect::<Vec<_>>(),
            Vec::<&String>::new(),
            "upstream threads are left that no thread names"
        );
    }
}

/// Waits until every run has ended, every deletion is finished, and the janitor has no work left.
async fn wait_until_done(scene: &Scene) {
    let begun = Instant::now();
    loop {
        // Failed and unacknowledged work is due again after minutes. This makes it due now.
        scene.database.age_due_times(Duration::from_mins(11)).await;
        let mut left = Vec::new();
        for sql in [
            "SELECT count(*) FROM runs WHERE finished_at IS NULL",
            "SELECT count(*) FROM deletions WHERE finished_at IS NULL",
            "SELECT count(*) FROM threads WHERE lifecycle = 'deleting'",
            "SELECT count(*) FROM threads WHERE lifecycle = 'archived' AND upstream_thread_id IS NOT NULL",
            "SELECT count(*) FROM upstream_orphans",
        ] {
            left.push(scene.database.number(sql).await);
        }
        if left.iter().all(|left| *left == 0) {
            return;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "runs, deletions, threads, archives, orphans left: {left:?}"
        );
        sleep(Duration::from_millis(100)).await;
    }
}

impl<'a> User<'a> {
    async fn live(mut self) -> Vec<String> {
        for _ in 0..share_of(ROUNDS) {
            self.talk().await;
            match self.rng.random_range(0..4) {
                0 => {
                    // A later run rebuilds the upstream thread from the transcript.
                    self.scene
                        .fault("start", "status=404 code=previous_response_not_found", 1);
                    self.scene.fault("create_thread", "latency=120ms", 1);
                }
                1 => self
                    .scene
                    .fault("create_thread", "drop=after latency=60ms", 1),
                2 => drop(
                    self.gateway
                        .post(&self.path("thread/rollover"), &json!({}))
                        .await,
                ),
                _ => {}
            }
            self.talk().await;
            self.delete().await;
        }
        self.erased
    }

    fn path(&self, rest: &str) -> String {
        format!("/v1/users/user-{}/topics/t/{rest}", self.number)
    }

    /// Sends some messages at once, and remembers the acknowledged ones.
    async fn talk(&mut self) {
        let sends: Vec<_> = (0..self.rng.random_range(1..5))
            .map(|_| self.message())
            .collect();
        let acknowledged = join_all(sends).await;
        self.kept.extend(acknowledged.into_iter().flatten());
    }

    /// Sends a message. Returns its text if it was acknowledged.
    fn message(&mut self) -> impl Future<Output = Option<String>> + use<'a> {
        let text = format!("<{}.{}>", self.number, self.said);
        self.said += 1;
        let turn = TURNS.choose(&mut self.rng).unwrap();
        let body = json!({
            "content": format!("{text} [[sim: {turn}]]"),
            "multitask_strategy": STRATEGIES.choose(&mut self.rng).unwrap(),
            "timeout_ms": 3000,
        });
        let request = self.gateway.request(Method::POST, &self.path("messages"));
        let gateway = self.gateway;
        async move {
            let answer = gateway
                .send(request.header("prefer", "respond-async").json(&body))
                .await;
            match answer.status {
                StatusCode::ACCEPTED | StatusCode::OK => Some(text),
                StatusCode::CONFLICT => None,
                // The message was accepted, and its run has failed already.
                StatusCode::BAD_GATEWAY if answer.body["run_id"].is_string() => Some(text),
                _ => panic!("{answer:?}"),
            }
        }
    }

    /// Deletes the conversation after a random pause, beside further messages and a rollover.
    async fn delete(&mut self) {
        let pause = Duration::from_millis(self.rng.random_range(0..60));
        let rolls = self.rng.random_bool(0.5);
        let archives = self.rng.random_bool(0.15);
        let had = std::mem::take(&mut self.kept);
        let deletes = self.gateway.request(
            Method::DELETE,
            &self.path(if archives {
                "thread?archive=true"
            } else {
                "thread"
            }),
        );
        let rollover = self
            .gateway
            .request(Method::POST, &self.path("thread/rollover"));
        let gateway = self.gateway;
        let beside = self.message();
        let deletion = async {
            sleep(pause).await;
            gateway.send(deletes.header("prefer", "wait=5")).await
        };
        let rollover = async {
            if rolls {
                sleep(pause).await;
                gateway.send(rollover.json(&json!({}))).await;
            }
        };
        let (answer, beside, ()) = join3(deletion, beside, rollover).await;
        let is_taken = matches!(answer.status.as_u16(), 200 | 202);
        assert!(
            is_taken || (had.is_empty() && answer.status == StatusCode::NOT_FOUND),
            "{answer:?}"
        );
        if archives {
            &mut self.kept
        } else {
            &mut self.erased
        }
        .extend(had);
        // Whether this message came before the deletion is not known. The next deletion erases it
        // at the latest.
        self.kept.extend(beside);
    }
}
