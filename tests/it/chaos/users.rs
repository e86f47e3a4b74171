//! The behaviour of users. Most send one message after the other. Some send several at once, some
//! delete their conversation, and some do all of that at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use reqwest::Method;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::client::{Client, PERSEVERANCE, Reply};
use super::fleet::ASSISTANTS;
use super::message::{Fate, Plan, Sent};
use super::sending::{Conversation, brief};
use super::world::World;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Habit {
    /// Waits for the answer before the next message, so that the messages have an order.
    Orderly,
    /// Sends several messages at once, with all strategies.
    Hasty,
    /// Is orderly, and deletes the conversation now and then.
    Deleting,
    /// Sends several messages at once. Meanwhile it rolls the conversation over, deletes it, or
    /// both.
    Hectic,
}

impl Habit {
    /// Whether the user's messages have an order, and a run each.
    pub(super) fn is_orderly(self) -> bool {
        matches!(self, Self::Orderly | Self::Deleting)
    }
}

pub(super) struct User {
    pub(super) number: usize,
    pub(super) habit: Habit,
    pub(super) talk: Conversation,
    pub(super) assistant: &'static str,
    /// For orderly users, in the order of acknowledgement.
    pub(super) sent: Vec<Sent>,
    deletions: usize,
    rng: StdRng,
}

const STRATEGIES: [&str; 7] = [
    "enqueue",
    "enqueue",
    "enqueue",
    "interrupt",
    "rollback",
    "merge",
    "reject",
];

impl User {
    pub(super) fn new(world: Arc<World>, number: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(world.seed.wrapping_add(1 + number as u64));
        let habit = match number % 10 {
            0 | 1 => Habit::Hasty,
            2 => Habit::Deleting,
            3 => Habit::Hectic,
            _ => Habit::Orderly,
        };
        let scope = match number % 3 {
            0 => format!("/v1/users/u{number}"),
            1 => format!("/v1/users/u{number}/sessions/s"),
            _ => format!("/v1/users/u{number}/topics/t"),
        };
        let (name, ..) = ASSISTANTS.choose(&mut rng).unwrap();
        let assistant = if *name == ASSISTANTS[0].0 {
            "default"
        } else {
            name
        };
        let client = Client::new(world, number, rng.random_bool(0.5));
        // A run that its sender does not follow may be deleted before the sender asks for it.
        let talk = Conversation {
            client,
            scope,
            may_be_deleted: habit == Habit::Hectic,
        };
        Self {
            number,
            habit,
            talk,
            assistant,
            sent: Vec::new(),
            deletions: 0,
            rng,
        }
    }

    /// Sends messages until the run of the test is over.
    pub(super) async fn talk(&mut self, at_once: &Semaphore, pause: Duration) {
        let over = self.talk.client.world.over.clone();
        loop {
            let thinks = pause.mul_f64(self.rng.random_range(0.0..2.0));
            tokio::select! {
                () = sleep(thinks) => {}
                () = over.cancelled() => return,
            }
            let _turn = at_once.acquire().await.unwrap();
            if over.is_cancelled() {
                return;
            }
            match self.habit {
                Habit::Hasty => self.burst().await,
                Habit::Hectic => self.upheaval().await,
                Habit::Deleting if self.rng.random_bool(0.15) => self.delete().await,
                Habit::Orderly | Habit::Deleting => {
                    let plan = self.plan();
                    let sent = self.talk.send(plan, self.deletions).await;
                    self.sent.push(sent);
                }
            }
        }
    }

    fn plan(&mut self) -> Plan {
        Plan::new(&mut self.rng, self.number, self.sent.len(), self.assistant)
    }

    async fn burst(&mut self) {
        let first = self.sent.len();
        let plans: Vec<Plan> = (0..self.rng.random_range(1..5))
            .map(|n| {
                let plan = Plan::new(&mut self.rng, self.number, first + n, self.assistant);
                plan.with_strategy(STRATEGIES.choose(&mut self.rng).unwrap())
            })
            .collect();
        let (talk, deletions) = (&self.talk, self.deletions);
        let sent = join_all(plans.into_iter().map(|plan| talk.send(plan, deletions))).await;
        self.sent.extend(sent);
    }

    /// Has several messages of all strategies acknowledged. Then, while their runs are active,
    /// rolls the thread over and deletes the conversation.
    async fn upheaval(&mut self) {
        let first = self.sent.len();
        let plans: Vec<Plan> = (0..self.rng.random_range(2..5))
            .map(|n| {
                let plan = Plan::new(&mut self.rng, self.number, first + n, self.assistant);
                plan.with_strategy(STRATEGIES.choose(&mut self.rng).unwrap())
                    .handed_in()
            })
            .collect();
        let (talk, deletions) = (&self.talk, self.deletions);
        let sent = join_all(plans.into_iter().map(|plan| talk.hand_in(plan, deletions))).await;
        self.sent.extend(sent);
        let (rolls, deletes) = (self.rng.random_bool(0.6), self.rng.random_bool(0.5));
        let client = &self.talk.client;
        let rollover = client.request(
            Method::POST,
            &format!("{}/thread/rollover", self.talk.scope),
        );
        let mut rolling = JoinSet::new();
        if rolls {
            client.world.count("threads: rolled over");
            rolling.spawn(rollover.json(&json!({})).send());
        }
        if deletes {
            self.delete().await;
        }
        // Either result of the rollover is right.
        rolling.join_all().await;
    }

    /// Deletes the conversation, and begins a new one.
    async fn delete(&mut self) {
        let client = &self.talk.client;
        let path = format!("{}/thread", self.talk.scope);
        client.tell("deletes the conversation");
        let begun = Instant::now();
        while begun.elapsed() < PERSEVERANCE {
            match client.ask(client.request(Method::DELETE, &path)).await {
                Reply::Answer(answer) if [200, 202, 404].contains(&answer.status.as_u16()) => {
                    client.tell(format!("answer to the deletion: {}", brief(&answer)));
                    client.world.count("threads: deleted");
                    self.deletions += 1;
                    return;
                }
                // A request whose client has given up may still arrive.
                Reply::Broken(why) => {
                    client.tell(format!("the deletion got no answer: {why}"));
                    self.talk.may_be_deleted = true;
                }
                Reply::Answer(answer) if answer.status == 503 => self.talk.may_be_deleted = true,
                Reply::Answer(answer) => {
                    client.fault(format!(
                        "unexpected answer to a deletion: {}",
                        brief(&answer)
                    ));
                    return;
                }
                Reply::Stream(_) => return client.fault("the answer to a deletion is a stream"),
            }
            client.pause().await;
        }
        client.fault("a deletion was never answered");
    }

    /// Sends messages that must be answered. They also bring what the upstream thread lacks.
    pub(super) async fn send_last_messages(&mut self) {
        for _ in 0..2 {
            let plan = Plan::plain(self.number, self.sent.len(), self.assistant);
            let sent = self.talk.send(plan, self.deletions).await;
            if sent.fate != Fate::Acknowledged {
                self.talk.client.fault(format!(
                    "{} was not accepted although no fault was active",
                    sent.plan.token
                ));
            }
            self.sent.push(sent);
        }
    }

    /// Returns how many deletions were requested.
    pub(super) fn deletions(&self) -> usize {
        self.deletions
    }
}
