//! Everything at once and at random: messages, cancels, tool outputs, readers that leave, and an
//! upstream that fails. The test checks the invariants afterwards. A failure prints the seed.

mod erasures;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use threadkeeper::domain::Timestamp;
use threadkeeper::simulator::{Fault, Recorded, SimulatorConfig};

use crate::support::chance::{seed, share_of};
use crate::support::gateway::{Answer, EventReader, Gateway, PATIENCE};
use crate::support::history::{all, assert_same, messages};
use crate::support::scene::{Scene, on_each_protocol_by_chance};

on_each_protocol_by_chance!(random_operations_keep_all_guarantees);

const OPERATIONS: usize = 1700;
const WORKERS: usize = 16;
const USERS: usize = 20;
/// Settings with short times, so that lost locks and silent upstreams do not prolong the test.
const SETTINGS: &str = "[runs]\nsettle_timeout = \"2s\"\nmax_retries = 2\n";
const UPSTREAM: &str = "lock_window = \"50ms\"\nbreaker_min_requests = 0\n";
/// Words that the model reads. A user's conversation has more after a while.
const CONTEXT_WORDS: u64 = 300;
/// Most requests that start a run of one message: four that the upstream refuses, and one for each
/// of `max_retries`.
const MAX_STARTS: usize = 4 + 2;

/// Recoveries that a user may have in ten minutes.
const MAX_RECOVERIES: usize = 30;

/// Directives for the simulator, one for each message.
const TURNS: [&str; 31] = [
    "",
    "",
    "",
    "",
    "tokens=30 rate=1ms",
    "tool=f",
    "tool=f tool=g",
    "fail",
    "incomplete",
    "refusal",
    "silent_after=2",
    "silent",
    "mid_error",
    "mid_error=bare",
    "late_head=100ms",
    "parts=2",
    "cut=3 tokens=20 rate=1ms",
    "no_terminal",
    "",
    "",
    // The message itself is refused.
    "status=400",
    "status=400 code=content_filter",
    "bare_error=string",
    // Each try of the run fails.
    "fail=rate_limit_exceeded retry_after=0.01",
    "fail=server_error retry_after=0.01",
    "empty",
    "halves",
    "unreadable tokens=20",
    "two_ends",
    // The history is refused from now on.
    "poison",
    "poison=invalid_image_url",
];
const FAULTS: [&str; 9] = [
    "status=503 retry_after=0.01",
    "status=429 retry_after=0.01",
    "status=500 retry_after=0.01",
    "status=401",
    "drop=before",
    "drop=after",
    "cut=2",
    "latency=30ms",
    "bare_error=line",
];
/// Faults for requests that start a run.
const START_FAULTS: [&str; 14] = [
    "gone",
    "gone",
    "status=400",
    "status=422 code=odd",
    "status=404 wording=relayed",
    "status=500 wording=string",
    "status=502 wording=html",
    "bare_error=string",
    "bare_error=detail",
    "fail=server_error retry_after=0.01",
    "fail=rate_limit_exceeded retry_after=0.01",
    "empty",
    "unreadable",
    "halves two_ends",
];
const STRATEGIES: [&str; 6] = [
    "enqueue",
    "enqueue",
    "reject",
    "interrupt",
    "rollback",
    "merge",
];

/// What the workers share.
struct World<'a> {
    scene: &'a Scene,
    gateway: &'a Gateway,
    /// Admitted runs, with their user.
    admitted: Mutex<Vec<(usize, String)>>,
    /// Acknowledged messages.
    said: Mutex<Vec<Said>>,
    /// Number of messages so far.
    sent: AtomicUsize,
    /// Runs that asked for function calls.
    asked: Mutex<Vec<(usize, Value)>>,
    answers: Mutex<BTreeMap<String, usize>>,
}

/// A message whose sender knows its run.
#[derive(Clone, Debug)]
struct Said {
    user: usize,
    /// A text that occurs in no other message.
    text: String,
    strategy: &'static str,
    run: String,
}

fn scope(user: usize) -> String {
    format!("/v1/users/user-{user}")
}

async fn random_operations_keep_all_guarantees(scene: Scene) {
    let config = SimulatorConfig {
        context_words: Some(CONTEXT_WORDS),
        recorded: 100_000,
        ..SimulatorConfig::default()
    };
    let scene = Scene::with(scene.protocol, scene.backend, config).await;
    let seed = seed();
    let mut gateway = scene.gateway_both(SETTINGS, UPSTREAM).await;
    // A warm-up opens the files that stay open.
    join_all((0..USERS).map(|user| gateway.say(&scope(user), "hello"))).await;
    let descriptors = open_files(&gateway);
    let world = World {
        scene: &scene,
        gateway: &gateway,
        admitted: Mutex::default(),
        said: Mutex::default(),
        sent: AtomicUsize::default(),
        asked: Mutex::default(),
        answers: Mutex::default(),
    };
    let workers = (0..WORKERS).map(|worker| {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(worker as u64));
        let world = &world;
        async move {
            for _ in 0..share_of(OPERATIONS) / WORKERS {
                operate(world, &mut rng).await;
            }
        }
    });
    join_all(workers).await;
    println!("answers: {:?}", world.answers.lock().unwrap());
    scene.simulator.clear_faults();

    // Every admitted run has ended, or ends by its deadline.
    all_end(&scene).await;
    let admitted = world.admitted.lock().unwrap().clone();
    for (user, run) in admitted {
        let read = gateway
            .get(&format!("{}/runs/{run}", scope(user)))
            .await
            .ok();
        assert!(read["run"]["finished_at"].is_string(), "{read:#}");
    }
    // The next message of each user succeeds, and then transcript and upstream thread are the
    // same.
    'users: for user in 0..USERS {
        for text in ["and now?", "and on"] {
            let answer = gateway
                .post(
                    &format!("{}/messages", scope(user)),
                    &json!({"content": text}),
                )
                .await;
            if answer.status != StatusCode::OK {
                let run = run_of(&answer).as_str().unwrap_or("no run");
                if has_spent_recoveries(&gateway, run) {
                    println!("user {user} has spent all recoveries");
                    continue 'users;
                }
                print_warnings(&gateway, run);
            }
            assert_eq!(
                answer.status,
                StatusCode::OK,
                "user {user}: {:#}",
                answer.body
            );
        }
        assert_same(&scene, &gateway, &scope(user)).await;
        assert_loss_is_told(&gateway, &scope(user)).await;
    }
    let said = world.said.lock().unwrap().clone();
    assert_each_is_there_once(&gateway, &said).await;
    assert_starts_are_bounded(&scene, &gateway);
    let stats = scene.simulator.stats();
    assert_eq!(
        (
            stats.max_generating_runs_per_thread,
            stats.messages_added_while_active
        ),
        (1, 0),
        "{stats:?}"
    );
    assert_eq!(stats.active_runs, 0, "the upstream has no active run");

    // The process has no work left.
    let grown = open_files(&gateway).saturating_sub(descriptors);
    assert!(
        grown < 64,
        "{grown} more files and connections are open than before"
    );
    gateway.terminate();
    assert!(gateway.exit().await.success());
    let stopping = gateway
        .logs()
        .into_iter()
        .find(|line| line.contains("\"stopping\""))
        .expect("the process logs that it is stopping");
    let stopping: Value = serde_json::from_str(&stopping).unwrap();
    let left = (&stopping["runs"], &stopping["lines"]);
    assert_eq!(
        left,
        (&json!(0), &json!(0)),
        "tasks or tickets are left: {stopping}"
    );
}

/// Asserts that each acknowledged message is once in its transcript, or was rolled back.
async fn assert_each_is_there_once(gateway: &Gateway, said: &[Said]) {
    for user in 0..USERS {
        let transcript = messages(gateway, &scope(user)).await;
        let texts: Vec<String> = transcript
            .iter()
            .filter(|message| message["role"] == "user")
            .map(|message| message["content"].to_string())
            .collect();
        for said in said.iter().filter(|said| said.user == user) {
            let run = gateway
                .get(&format!("{}/runs/{}", scope(user), said.run))
                .await
                .ok();
            let run = &run["run"];
            let refused = said.strategy == "reject" && run["error"]["code"] == "upstream_busy";
            let wanted = usize::from(run["rolled_back"] != true && !refused);
            let found = texts.iter().filter(|text| text.contains(&said.text));
            assert_eq!(found.count(), wanted, "{said:?}: {run:#}");
        }
    }
}

/// Prints, for the report of a failure, what the gateway warned about the user of a run.
fn print_warnings(gateway: &Gateway, run: &str) {
    for line in story(gateway, run) {
        if line.contains("\"WARN\"") || line.contains("run ended") {
            println!("  LOG {line}");
        }
    }
}

/// Whether the user of a run has had all the recoveries that a user may have in ten minutes. On a
/// slow machine, short deadlines cut off one recovery after the other.
fn has_spent_recoveries(gateway: &Gateway, run: &str) -> bool {
    let story = story(gateway, run);
    let tries = story
        .iter()
        .filter(|line| line.contains("trying a new thread"));
    tries.count() >= MAX_RECOVERIES
}

/// Returns the log lines about the user of a run.
fn story(gateway: &Gateway, run: &str) -> Vec<String> {
    let mut logs = gateway.logs();
    let user = logs.iter().find_map(|line| {
        let (_, after) = line
            .split_once("\"user\":\"")
            .filter(|_| line.contains(run))?;
        after.split_once('"').map(|(user, _)| user.to_owned())
    });
    logs.retain(|line| user.as_ref().is_some_and(|user| line.contains(user)));
    logs
}

/// Asserts that a message of a completed run which the model does not know any more was left out by
/// a later run that says so. A later run may have been rolled back.
async fn assert_loss_is_told(gateway: &Gateway, scope: &str) {
    let runs = all(gateway, &format!("{scope}/runs")).await;
    let transcript = messages(gateway, scope).await;
    let tells = |run: &Value| run["recovered"]["messages_left_out"].as_u64() > Some(0);
    let last_told = runs.iter().filter(|run| tells(run)).map(started_at).max();
    for message in &transcript {
        let run = runs.iter().find(|run| run["id"] == message["run_id"]);
        let completed = run.filter(|run| run["status"] == "completed");
        let is_hidden = message["visible_to_model"] == false;
        if is_hidden && completed.is_some_and(|run| Some(started_at(run)) >= last_told) {
            print_warnings(gateway, message["run_id"].as_str().unwrap());
            println!("{runs:#?}");
            panic!("{scope}: nobody told that the model lost this: {message:#}");
        }
    }
}

fn started_at(run: &Value) -> Timestamp {
    run["started_at"].as_str().unwrap().parse().unwrap()
}

/// Asserts that no message cost more requests than the documented number. Waits for a thread that
/// something else holds, and repairs of a conversation, are not counted.
fn assert_starts_are_bounded(scene: &Scene, gateway: &Gateway) {
    let mut starts: BTreeMap<String, usize> = BTreeMap::new();
    for request in scene.simulator.recorded().iter().filter(|it| is_start(it)) {
        if let Some(run) = request.body["metadata"]["threadkeeper_run"].as_str() {
            *starts.entry(run.to_owned()).or_default() += 1;
        }
    }
    let special: Vec<String> = gateway
        .logs()
        .into_iter()
        .filter(|line| {
            line.contains("another run holds the upstream thread")
                || line.contains("repairing the upstream thread")
        })
        .collect();
    starts.retain(|run, starts| {
        *starts > MAX_STARTS && !special.iter().any(|line| line.contains(run.as_str()))
    });
    assert!(
        starts.is_empty(),
        "too many requests for a message: {starts:?}"
    );
}

/// Whether a request is to start the run of a message, and does not answer calls.
fn is_start(request: &Recorded) -> bool {
    match request.operation.as_deref() {
        Some("create_run") => true,
        Some("create_response") => {
            let last = request.body["input"]
                .as_array()
                .and_then(|input| input.last());
            last.is_some_and(|item| item["role"] == "user")
        }
        _ => false,
    }
}

async fn all_end(scene: &Scene) {
    let start = Instant::now();
    let unfinished = "SELECT count(*) FROM runs WHERE finished_at IS NULL";
    while scene.database.number(unfinished).await > 0 {
        assert!(start.elapsed() < PATIENCE, "some runs never ended");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Returns the number of the process's open files and sockets.
fn open_files(gateway: &Gateway) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", gateway.id()))
        .unwrap()
        .count()
}

async fn operate(world: &World<'_>, rng: &mut StdRng) {
    let user = rng.random_range(0..USERS);
    match rng.random_range(0..100) {
        0..50 => say(world, rng, user).await,
        50..60 => {
            let which = ["active", "queued", "all"].choose(rng).unwrap();
            let path = format!("{}/thread/cancel?which={which}", scope(user));
            seen(
                world,
                &world
                    .gateway
                    .send(world.gateway.request(Method::POST, &path))
                    .await,
                &[200],
            );
        }
        60..68 => {
            let Some((user, run)) = world.admitted.lock().unwrap().choose(rng).cloned() else {
                return;
            };
            let path = format!("{}/runs/{run}/cancel", scope(user));
            seen(
                world,
                &world
                    .gateway
                    .send(world.gateway.request(Method::POST, &path))
                    .await,
                &[200],
            );
        }
        68..82 => give(world, rng).await,
        82..90 => {
            let for_starts = rng.random_bool(0.5);
            let fault = if for_starts {
                START_FAULTS.choose(rng).unwrap()
            } else {
                FAULTS.choose(rng).unwrap()
            };
            // Only streams can be cut; the other faults suit any request.
            let on = if for_starts || fault.starts_with("cut") || rng.random_bool(0.7) {
                "start"
            } else {
                "any"
            };
            let fault = Fault {
                on: on.to_owned(),
                fault: (*fault).to_owned(),
                times: 1,
            };
            world.scene.simulator.add_fault(fault).unwrap();
        }
        90..95 => {
            let Some((user, run)) = world.admitted.lock().unwrap().choose(rng).cloned() else {
                return;
            };
            let path = format!("{}/runs/{run}/events", scope(user));
            let response = world
                .gateway
                .request(Method::GET, &path)
                .send()
                .await
                .unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            let events = EventReader::new(response);
            if rng.random_bool(0.5) {
                assert!(ends(&events.rest().await.last().unwrap().name));
            }
        }
        _ => {
            let path = ["thread", "messages", "runs"].choose(rng).unwrap();
            seen(
                world,
                &world.gateway.get(&format!("{}/{path}", scope(user))).await,
                &[200],
            );
        }
    }
}

fn ends(name: &str) -> bool {
    [
        "run.completed",
        "run.incomplete",
        "run.failed",
        "run.cancelled",
        "run.expired",
    ]
    .contains(&name)
}

/// Counts an answer, which must be a documented one.
fn seen(world: &World<'_>, answer: &Answer, expected: &[u16]) {
    let kind = answer.body["type"]
        .as_str()
        .unwrap_or_default()
        .rsplit(':')
        .next()
        .unwrap_or_default();
    let what = format!(
        "{} {kind} {}",
        answer.status.as_u16(),
        answer.body["code"].as_str().unwrap_or_default()
    );
    assert!(
        expected.contains(&answer.status.as_u16()),
        "{what}: {:#}",
        answer.body
    );
    *world.answers.lock().unwrap().entry(what).or_default() += 1;
}

async fn say(world: &World<'_>, rng: &mut StdRng, user: usize) {
    let turn = TURNS.choose(rng).unwrap();
    let turn = if turn.is_empty() {
        String::new()
    } else {
        format!(" [[sim: {turn}]]")
    };
    let strategy: &'static str = STRATEGIES.choose(rng).unwrap();
    let number = world.sent.fetch_add(1, Ordering::Relaxed);
    let text = format!("message <{number}>");
    let heard = |run: &Value| {
        if let Some(run) = run.as_str() {
            world.said.lock().unwrap().push(Said {
                user,
                text: text.clone(),
                strategy,
                run: run.to_owned(),
            });
        }
    };
    let mut body = json!({
        "content": format!("{text}{turn}"),
        "multitask_strategy": strategy,
        // Some runs meet their deadline, most have time.
        "timeout_ms": if rng.random_bool(0.3) { 150 } else { 3000 },
    });
    if rng.random_bool(0.2) {
        body["on_disconnect"] = "cancel".into();
    }
    let path = format!("{}/messages", scope(user));
    let mut request = world.gateway.request(Method::POST, &path);
    if rng.random_bool(0.3) {
        request = request.header(
            "idempotency-key",
            format!("k{}", rng.random_range(0..1_000_000_000_u32)),
        );
    }
    match rng.random_range(0..4) {
        0 => {
            let answer = world.gateway.send(request.json(&body)).await;
            seen(world, &answer, &[200, 409, 422, 502, 503, 504]);
            heard(run_of(&answer));
            noted(world, user, &answer.body["run"]);
        }
        1 => {
            let answer = world
                .gateway
                .send(request.header("prefer", "respond-async").json(&body))
                .await;
            seen(world, &answer, &[200, 202, 409, 422, 502, 503, 504]);
            heard(run_of(&answer));
            noted(world, user, &answer.body["run"]);
        }
        form => {
            body["stream"] = true.into();
            let response = request.json(&body).send().await.unwrap();
            if response.status() != StatusCode::OK {
                let status = response.status();
                assert!(matches!(status.as_u16(), 409 | 503), "{status}");
                return;
            }
            let mut events = EventReader::new(response);
            // The reader leaves in the middle, or stays to the end.
            let mut left = if form == 2 {
                rng.random_range(1..6)
            } else {
                usize::MAX
            };
            let mut last = None;
            while left > 0 {
                let Some(event) = events.next().await else {
                    break;
                };
                if last.is_none() {
                    heard(&event.data["run_id"]);
                }
                if let Some(run) = event.data["run_id"].as_str() {
                    noted(world, user, &json!({"id": run}));
                }
                if event.name == "run.requires_action" {
                    let action = json!({"tool_calls": event.data["tool_calls"]});
                    noted(
                        world,
                        user,
                        &json!({"id": event.data["run_id"], "required_action": action}),
                    );
                }
                left -= 1;
                last = Some(event);
            }
            if form == 3 {
                let last = last.unwrap();
                assert!(
                    ends(&last.name) || last.name == "run.requires_action",
                    "the stream broke: {last:?}"
                );
            }
        }
    }
}

/// Returns the id of the run that an answer tells, if the message was acknowledged.
fn run_of(answer: &Answer) -> &Value {
    match answer.status.as_u16() {
        409 => &Value::Null,
        _ if answer.body["run"]["id"].is_string() => &answer.body["run"]["id"],
        _ => &answer.body["run_id"],
    }
}

fn noted(world: &World<'_>, user: usize, run: &Value) {
    let Some(id) = run["id"].as_str() else { return };
    world.admitted.lock().unwrap().push((user, id.to_owned()));
    if run["required_action"].is_object() {
        world.asked.lock().unwrap().push((user, run.clone()));
    }
}

/// Answers a run that asked for function calls: early or late, all calls or some.
async fn give(world: &World<'_>, rng: &mut StdRng) {
    let Some((user, run)) = world.asked.lock().unwrap().last().cloned() else {
        return;
    };
    let calls = run["required_action"]["tool_calls"].as_array().unwrap();
    let output = if rng.random_bool(0.2) {
        "again [[sim: tool=h]]"
    } else {
        "4 °C"
    };
    let mut outputs: Vec<Value> = calls
        .iter()
        .map(|call| json!({"tool_call_id": call["id"], "output": output}))
        .collect();
    if rng.random_bool(0.1) {
        outputs.pop();
    }
    let path = format!(
        "{}/runs/{}/tool_outputs",
        scope(user),
        run["id"].as_str().unwrap()
    );
    let answer = world
        .gateway
        .post(&path, &json!({"tool_outputs": outputs}))
        .await;
    seen(world, &answer, &[200, 409, 422, 502, 503, 504]);
    noted(world, user, &answer.body["run"]);
    world
        .asked
        .lock()
        .unwrap()
        .retain(|(_, other)| other != &run);
}
