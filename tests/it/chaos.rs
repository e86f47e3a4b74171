//! Chaos: everything fails at random, all the time. Replicas are killed, stopped and frozen.
//! Connections are cut. The database goes away and comes back. Meanwhile hundreds of users send
//! messages, as clients do that rely on each answer and know nothing without one. At the end the
//! test repairs everything, and compares what the users were told with database and upstream.
//!
//! `THREADKEEPER_CHAOS_FOR=30m` sets the duration; the default suits `cargo test`. The printed
//! seed (`THREADKEEPER_TEST_SEED`) chooses messages and faults, but not their timing. So a seed
//! repeats a scenario, not a run. Without a seed each run differs: one run may find what another
//! one missed.

mod balancer;
mod check;
mod client;
mod fault_injector;
mod fleet;
mod message;
mod seen;
mod sending;
mod takeover;
mod users;
mod world;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use serde_json::Value;
use threadkeeper::domain::Timestamp;
use threadkeeper::simulator::SimulatorConfig;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};

use crate::support::TestDatabase;
use crate::support::chance::seed;
use crate::support::cluster::Cluster;
use crate::support::gateway::PATIENCE;
use crate::support::scene::{Backend, Protocol, Scene};
use fault_injector::Temper;
use fleet::Fleet;
use users::User;
use world::{Teller, World};

const DEFAULT: Duration = Duration::from_secs(30);
/// Shortest duration that counts as long. A long run is started alone, and has the machine for
/// itself.
const LONG: Duration = Duration::from_mins(2);
/// Longest wait for the users' last requests after the end. It allows each user one message even
/// if everything fails.
const LAST_ONES: Duration = Duration::from_mins(5);
/// Largest number of open files and sockets of an idle process: its connections to the database,
/// and connections that are kept alive.
const OPEN_FILES: usize = 400;

/// Words that the model reads. A talkative user's conversation has more after a while.
const CONTEXT_WORDS: u64 = 400;

/// Longest time for which a process looks for a message whose sender was told that it was not
/// accepted.
const LOOKS_FOR: Duration = Duration::from_secs(28);

/// Load and duration of a run.
struct Scale {
    time: Duration,
    users: usize,
    /// Largest number of messages in flight at the same time.
    at_once: usize,
    /// Mean pause of a user between two messages.
    pause: Duration,
    temper: Temper,
}

impl Scale {
    fn of_environment() -> Self {
        let time = std::env::var("THREADKEEPER_CHAOS_FOR");
        let time = time.map_or(DEFAULT, |text| {
            humantime_serde::re::humantime::parse_duration(&text).unwrap()
        });
        let is_long = time >= LONG;
        Self {
            time,
            users: if is_long { 200 } else { 48 },
            at_once: if is_long { 64 } else { 24 },
            pause: Duration::from_secs(if is_long { 3 } else { 1 }),
            temper: Temper {
                pause: Duration::from_millis(if is_long { 1500 } else { 1000 }),
                longest_outage: Duration::from_secs(if is_long { 20 } else { 4 }),
            },
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_failures_neither_lose_nor_duplicate_messages() {
    let seed = seed();
    let scale = Scale::of_environment();
    // Upstream threads whose creation was never acknowledged can be found only on a server that
    // lists threads.
    let config = SimulatorConfig {
        list_threads: true,
        context_words: Some(CONTEXT_WORDS),
        ..SimulatorConfig::default()
    };
    let server = spawn_blocking(Cluster::start).await.unwrap();
    let database = TestDatabase::on(&server).await;
    let scene = Scene::on(database, Protocol::Responses, Backend::Postgres, config).await;
    let fleet = Fleet::start(&scene.database.url(), &scene.upstream_url).await;
    let world = Arc::new(World::new(seed, fleet, scene, server));
    all_ready(&world).await;

    let users = talk(&world, &scale).await;
    all_ready(&world).await;
    check::quiet(&world).await;
    let users = send_last_messages(users).await;
    check::quiet(&world).await;

    check::nothing_left(&world, world.fleet.len()).await;
    let gateway = world.fleet.lock(0).await;
    stream::iter(&users)
        .for_each_concurrent(8, |user| check::user(&world, gateway.gateway(), user))
        .await;
    drop(gateway);
    if world.counted("runs: completed") * 2 < world.counted("messages: acknowledged") {
        world.fault(
            Teller::Nobody,
            "less than half of the runs completed: this shows little",
        );
    }
    if scale.time >= LONG {
        // By then no process may look for a refused message any more.
        sleep(LOOKS_FOR).await;
    }
    stop_all(&world).await;
    println!("{}", world.summary());
    if world.has_faults() {
        println!("{}", world.report().await);
        panic!("the invariants do not hold: see above");
    }
}

/// Runs users and fault injector until both have ended.
async fn talk(world: &Arc<World>, scale: &Scale) -> Vec<User> {
    let at_once = Arc::new(Semaphore::new(scale.at_once));
    let mut talking = JoinSet::new();
    for number in 0..scale.users {
        let (mut user, at_once, pause) = (
            User::new(Arc::clone(world), number),
            Arc::clone(&at_once),
            scale.pause,
        );
        talking.spawn(async move {
            user.talk(&at_once, pause).await;
            user
        });
    }
    let mut fault_injector = JoinSet::new();
    if std::env::var_os("THREADKEEPER_CHAOS_TAME").is_none() {
        fault_injector.spawn(fault_injector::work(Arc::clone(world), scale.temper));
    }
    sleep(scale.time).await;
    world.over.cancel();
    let ended = async {
        fault_injector.join_all().await;
        talking.join_all().await
    };
    let mut users = timeout(LAST_ONES, ended)
        .await
        .expect("all users end in time");
    users.sort_by_key(|user| user.number);
    users
}

/// Waits until the balancer has seen all replicas ready.
async fn all_ready(world: &World) {
    let ready = async {
        while world.fleet.balancer.ready() < world.fleet.len() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    if timeout(PATIENCE, ready).await.is_err() {
        world.fault(
            Teller::Nobody,
            format!("only {} replicas are ready", world.fleet.balancer.ready()),
        );
    }
}

/// Lets each user send two last messages, now that everything works.
async fn send_last_messages(users: Vec<User>) -> Vec<User> {
    let leaving = users.into_iter().map(|mut user| async move {
        user.send_last_messages().await;
        user
    });
    stream::iter(leaving).buffered(16).collect().await
}

/// Stops all replicas at once, and checks that no task or ticket is left in them.
async fn stop_all(world: &World) {
    join_all((0..world.fleet.len()).map(|place| async move {
        let mut replica = world.fleet.lock(place).await;
        let (process, open) = (replica.process(), replica.open_files());
        if open > OPEN_FILES {
            world.fault(Teller::Nobody, format!("{process} has {open} open files"));
        }
        let stopped = world.fleet.stop(&mut replica).await;
        fault_injector::check_stop(world, &process, &stopped);
        let (left, may_be_left) = left_over(&stopped.log);
        if left.runs > may_be_left || left.lines > 0 {
            world.fault(
                Teller::Nobody,
                format!("{process} has tasks or tickets left: {left:?}"),
            );
        }
    }))
    .await;
    let left = world
        .scene
        .database
        .number("SELECT count(*) FROM replicas WHERE expires_at > now()")
        .await;
    if left != 0 {
        world.fault(
            Teller::Nobody,
            format!("{left} replicas still have a session"),
        );
    }
}

/// The work of a process when it was told to stop.
#[derive(Debug, serde::Deserialize)]
struct Left {
    /// The number of tasks.
    runs: usize,
    lines: usize,
}

/// Returns the work that was left according to the log, and the number of tasks that may be left.
/// For each message that was refused because of the database, one task looks whether it was
/// recorded all the same.
fn left_over(log: &[String]) -> (Left, usize) {
    let lines: Vec<Value> = log
        .iter()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let time = |line: &Value| {
        line["timestamp"]
            .as_str()
            .unwrap()
            .parse::<Timestamp>()
            .unwrap()
    };
    let stopping = lines
        .iter()
        .find(|line| line["message"] == "stopping")
        .expect("the process logs that it is stopping");
    let lately = lines.iter().filter(|line| {
        (time(stopping) - time(line))
            .to_std()
            .is_ok_and(|ago| ago < LOOKS_FOR)
    });
    let refused = lately.filter(|line| {
        let request = &line["spans"][0];
        let route = request["route"].as_str().unwrap_or_default();
        line["message"] == "the request failed"
            && request["method"] == "POST"
            && route.ends_with("/messages")
    });
    (
        serde_json::from_value(stopping.clone()).unwrap(),
        refused.count(),
    )
}
