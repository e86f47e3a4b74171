//! The fault injector: it disturbs processes, connections and the database at random.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use threadkeeper::simulator::Fault;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::sleep;

use super::fleet::{GRACE, LAST_WORDS, Replica, SESSION, Stopped};
use super::world::{Teller, World};
use crate::support::cluster::Stop;
use crate::support::link::{Valve, Weather};

/// Frequency and length of the faults.
#[derive(Clone, Copy, Debug)]
pub(super) struct Temper {
    /// Mean pause between two faults.
    pub(super) pause: Duration,
    /// Longest time without the database.
    pub(super) longest_outage: Duration,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Action {
    Kill,
    Stop,
    /// Freezes a replica for longer than its session lasts.
    Freeze,
    /// Freezes a replica for less than its session lasts.
    Hiccup,
    /// Cuts the connections between clients and a replica.
    CutClients,
    DelayClients,
    /// Cuts the connections between a replica and the database.
    CutDatabase,
    DelayDatabase,
    /// Swallows everything between a replica and the database. The connections stay open.
    LoseDatabase,
    /// Refuses connections from a replica to the database.
    RefuseDatabase,
    CutUpstream,
    UpstreamFault,
    /// Stops the database's server for a while.
    Outage,
    /// Restarts the database's server.
    Restart,
    /// Delays everything between all replicas and the database.
    SlowDatabase,
}

const DEEDS: [(Action, u32); 15] = [
    (Action::Kill, 12),
    (Action::Stop, 10),
    (Action::Freeze, 7),
    (Action::Hiccup, 4),
    (Action::CutClients, 8),
    (Action::DelayClients, 3),
    (Action::CutDatabase, 5),
    (Action::DelayDatabase, 4),
    (Action::LoseDatabase, 5),
    (Action::RefuseDatabase, 3),
    (Action::CutUpstream, 4),
    (Action::UpstreamFault, 6),
    (Action::Outage, 4),
    (Action::Restart, 4),
    (Action::SlowDatabase, 3),
];

const UPSTREAM_FAULTS: [(&str, &str); 6] = [
    ("start", "status=503 retry_after=0.05"),
    ("start", "drop=before"),
    ("start", "drop=after"),
    ("start", "cut=3"),
    ("create_thread", "drop=after"),
    ("any", "latency=200ms"),
];

/// Refusals and odd answers to a request that starts a run. One comes with most of the other faults.
const ODD_ANSWERS: [&str; 12] = [
    "gone",
    "gone",
    "status=400",
    "status=404 wording=relayed",
    "status=502 wording=html",
    "status=500 wording=string",
    "bare_error=string",
    "bare_error=detail",
    "fail=server_error retry_after=0.05",
    "fail=rate_limit_exceeded retry_after=0.05",
    "empty",
    "unreadable",
];
const ODD_ANSWER_RATE: f64 = 0.7;

/// Injects faults until the run is over, then repairs everything.
pub(super) async fn work(world: Arc<World>, temper: Temper) {
    let mut rng = StdRng::seed_from_u64(world.seed);
    let mut actions = JoinSet::new();
    loop {
        let pause = temper.pause.mul_f64(rng.random_range(0.1..1.9));
        tokio::select! {
            () = sleep(pause) => {}
            () = world.over.cancelled() => break,
        }
        while let Some(done) = actions.try_join_next() {
            done.unwrap();
        }
        let action = DEEDS
            .choose_weighted(&mut rng, |(_, weight)| *weight)
            .unwrap()
            .0;
        let (place, part) = (
            rng.random_range(0..world.fleet.len()),
            rng.random_range(0.0..1.0),
        );
        let fault = *UPSTREAM_FAULTS.choose(&mut rng).unwrap();
        let odd_answer = *ODD_ANSWERS.choose(&mut rng).unwrap();
        if rng.random_bool(ODD_ANSWER_RATE) {
            trouble_upstream(&world, "start", odd_answer);
        }
        match action {
            Action::UpstreamFault => trouble_upstream(&world, fault.0, fault.1),
            Action::Outage | Action::Restart => {
                actions.spawn(trouble_all(Arc::clone(&world), action, part, temper));
            }
            Action::SlowDatabase => {
                actions.spawn(slow_all(Arc::clone(&world), part));
            }
            _ => {
                // One replica always stays undisturbed. Otherwise no work would be done.
                let busy = (0..world.fleet.len())
                    .filter(|place| world.fleet.try_lock(*place).is_none())
                    .count();
                if busy + 1 < world.fleet.len() && world.fleet.try_lock(place).is_some() {
                    let world = Arc::clone(&world);
                    actions.spawn(async move {
                        let mut replica = world.fleet.lock(place).await;
                        trouble_one(&world, &mut replica, action, part).await;
                    });
                }
            }
        }
    }
    while let Some(done) = actions.join_next().await {
        done.unwrap();
    }
    world.scene.simulator.clear_faults();
    log(&world, "all is put right".to_owned());
}

/// Disturbs the next request of a kind at the upstream.
fn trouble_upstream(world: &World, on: &str, fault: &str) {
    log(world, format!("upstream: {fault} for the next {on}"));
    world.count("actions: upstream faults");
    let fault = Fault {
        on: on.to_owned(),
        fault: fault.to_owned(),
        times: 1,
    };
    world.scene.simulator.add_fault(fault).unwrap();
}

fn log(world: &World, what: String) {
    world.tell(Teller::FaultInjector, what);
}

/// Returns a time between `least` and `most`.
fn part_of(least: Duration, most: Duration, part: f64) -> Duration {
    least + (most.saturating_sub(least)).mul_f64(part)
}

async fn trouble_one(world: &Arc<World>, replica: &mut Replica, action: Action, part: f64) {
    let _trouble = world.trouble();
    let process = replica.process();
    let what = format!("{process}: {action:?}");
    log(world, what.clone());
    world.count(&format!("actions: {action:?}"));
    let clients = world.fleet.balancer.valve(replica.place).clone();
    let while_session = part_of(SESSION / 2, SESSION * 3, part);
    match action {
        Action::Kill => {
            let watch = super::takeover::Watch::begin(world, replica.gateway().address()).await;
            world.fleet.kill(replica);
            let mut watching = JoinSet::new();
            if let Some(watch) = watch {
                watching.spawn(watch.end(Arc::clone(world)));
            }
            sleep(part_of(Duration::ZERO, SESSION * 2, part)).await;
            world.fleet.launch(replica).await;
            while let Some(watched) = watching.join_next().await {
                watched.unwrap();
            }
        }
        Action::Stop => {
            let stopped = world.fleet.stop(replica).await;
            check_stop(world, &process, &stopped);
            sleep(part_of(Duration::ZERO, SESSION, part)).await;
            world.fleet.launch(replica).await;
        }
        Action::Freeze => {
            replica.gateway().freeze();
            sleep(part_of(SESSION * 5 / 4, SESSION * 3, part)).await;
            replica.gateway().thaw();
        }
        Action::Hiccup => {
            replica.gateway().freeze();
            sleep(part_of(SESSION / 10, SESSION * 9 / 10, part)).await;
            replica.gateway().thaw();
        }
        Action::CutClients => clients.cut(),
        Action::DelayClients => {
            let weather = Weather {
                delay: part_of(Duration::from_millis(20), Duration::from_millis(200), part),
                ..Weather::default()
            };
            during(&clients, weather, while_session).await;
        }
        Action::CutDatabase => replica.database.valve.cut(),
        Action::DelayDatabase => during(&replica.database.valve, slow(part), while_session).await,
        Action::LoseDatabase => {
            let weather = Weather {
                swallows: true,
                ..Weather::default()
            };
            during(&replica.database.valve, weather, while_session).await;
        }
        Action::RefuseDatabase => {
            let weather = Weather {
                refuses: true,
                ..Weather::default()
            };
            replica.database.valve.set(weather);
            replica.database.valve.cut();
            during(&replica.database.valve, weather, while_session).await;
        }
        Action::CutUpstream => replica.upstream.valve.cut(),
        Action::UpstreamFault | Action::Outage | Action::Restart | Action::SlowDatabase => {}
    }
    log(world, format!("{what} is over"));
}

/// Stops, restarts or slows the database's server.
async fn trouble_all(world: Arc<World>, action: Action, part: f64, temper: Temper) {
    let Ok(mut server) = Arc::clone(&world.server).try_write_owned() else {
        return;
    };
    let _trouble = world.trouble();
    let time = match action {
        Action::Restart => Duration::ZERO,
        _ => part_of(Duration::from_millis(300), temper.longest_outage, part),
    };
    // A crash occurs more often, since it is harder to survive than an orderly stop.
    let how = if part < 0.3 {
        Stop::Fast
    } else {
        Stop::Immediate
    };
    log(
        &world,
        format!("the database: {action:?}, {how:?}, {time:?}"),
    );
    world.count(&format!("actions: {action:?}"));
    let blocking = spawn_blocking(move || {
        server.stop(how);
        std::thread::sleep(time);
        server.start_again();
    });
    blocking.await.unwrap();
    log(&world, format!("the database: {action:?} is over"));
}

/// Delays the database for all replicas without another fault.
async fn slow_all(world: Arc<World>, part: f64) {
    let held: Vec<_> = (0..world.fleet.len())
        .filter_map(|place| world.fleet.try_lock(place))
        .collect();
    let _trouble = world.trouble();
    log(
        &world,
        format!("the database is slow for {} replicas", held.len()),
    );
    world.count("actions: SlowDatabase");
    for replica in &held {
        replica.database.valve.set(slow(part));
    }
    sleep(part_of(SESSION / 2, SESSION * 3, part)).await;
    for replica in &held {
        replica.database.valve.set(Weather::default());
    }
    log(&world, "the database is fast again".to_owned());
}

fn slow(part: f64) -> Weather {
    Weather {
        delay: part_of(Duration::from_millis(20), Duration::from_millis(150), part),
        ..Weather::default()
    }
}

async fn during(valve: &Valve, weather: Weather, time: Duration) {
    valve.set(weather);
    sleep(time).await;
    valve.set(Weather::default());
}

/// Checks that a process ended with 0 and within its bound after it was asked to.
pub(super) fn check_stop(world: &World, process: &str, stopped: &Stopped) {
    world.took("stop", stopped.took);
    if !stopped.status.success() {
        world.fault(
            Teller::FaultInjector,
            format!("{process} was stopped and ended with {}", stopped.status),
        );
    }
    if stopped.took > GRACE + LAST_WORDS {
        world.fault(
            Teller::FaultInjector,
            format!("{process} took {:?} to stop", stopped.took),
        );
    }
    log(
        world,
        format!("{process} stopped within {:?}", stopped.took),
    );
}
