//! Requests made from the gateway's own OpenAPI document: good ones, and ones that are wrong in
//! every way, many at a time. Every answer must be documented, and none may report a failure of
//! the gateway.
//!
//! `THREADKEEPER_FUZZ_FOR=10m` sets the duration; the default suits `cargo test`. The printed
//! seed (`THREADKEEPER_TEST_SEED`) chooses the requests, but not their timing or the ids in them.

mod pool;
mod raw;
mod requests;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rand::SeedableRng;
use rand::rngs::StdRng;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::chance::seed;
use crate::support::contract;
use crate::support::gateway::{Event, Gateway};
use crate::support::scene::{Scene, on_each_protocol_by_chance};
use pool::Pool;
use raw::Response;
use requests::{Generator, Operation, Request};

on_each_protocol_by_chance!(
    fuzzed_requests_get_documented_answers,
    fuzzed_requests_without_transcript_get_documented_answers,
);

const WORKERS: usize = 12;
/// Number of requests of each worker.
const REQUESTS: usize = 90;
/// Longest wait for an answer. A cleanup waits for all due work, which can take more than half a
/// minute on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);
/// How long a reader reads events before it leaves.
const READS_FOR: Duration = Duration::from_millis(300);
/// Number of faults after which the test stops.
const ENOUGH: usize = 5;

/// Settings with short deadlines: for runs that await tool outputs, and for bodies that never
/// arrive.
const SETTINGS: &str = r#"
[server]
max_body_bytes = 65536
body_read_timeout = "300ms"
[runs]
timeout = "2s"
settle_timeout = "2s"
[janitor]
calls_per_second = 10000
[limits]
user_messages = "100000/s"
user_requests = "100000/s"
tenant_messages = "100000/s"
tenant_requests = "100000/s"
[auth.keys.operator]
key = "operator-of-the-tenant-default"
scope = "operator"
[auth.keys.chatter]
key = "chatter-of-the-tenant-default"
scope = "chat"
[auth.keys.reader]
key = "reader-of-the-tenant-default"
scope = "read"
[auth.keys.other]
key = "operator-of-the-tenant-other"
tenant = "other"
scope = "operator"
[auth.jwt]
issuer = "https://login.example.com/"
audience = ["chat"]
algorithms = ["HS256"]
secret = "what-the-gateway-and-its-issuer-share"
"#;
const OPERATOR: &str = "operator-of-the-tenant-default";
/// A signed token of one user. Its claims are
/// `{"iss":"https://login.example.com/","aud":"chat","sub":"alice","exp":4102444800}`; it expires
/// in the year 2100.
const ALICE: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJodHRwczovL2xvZ2luLmV4YW1wbGUuY29tLyIsImF1ZCI6ImNoYX\
                     QiLCJzdWIiOiJhbGljZSIsImV4cCI6NDEwMjQ0NDgwMH0.9rSw-7c96oCQ509bdSBzQqBGTXXnewKqLC2pxv9iWwM";

/// What all workers share.
struct World {
    gateway: Gateway,
    document: Value,
    operations: Vec<Operation>,
    pool: Pool,
    until: Option<Instant>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    faults: Vec<String>,
    /// Number of answers with each status.
    statuses: BTreeMap<u16, usize>,
    /// Operations that succeeded at least once.
    served: BTreeSet<String>,
}

async fn fuzzed_requests_get_documented_answers(scene: Scene) {
    send_and_judge(scene.gateway_with(SETTINGS).await).await;
}

async fn fuzzed_requests_without_transcript_get_documented_answers(scene: Scene) {
    let config = scene
        .config(SETTINGS)
        .replace("[store]\n", "[store]\ntranscript = \"off\"\n");
    send_and_judge(Gateway::start(&config).await).await;
}

async fn send_and_judge(gateway: Gateway) {
    let seed = seed();
    let time = std::env::var("THREADKEEPER_FUZZ_FOR");
    let time = time.map(|text| humantime_serde::re::humantime::parse_duration(&text).unwrap());
    let document = gateway.get("/openapi.json").await.ok();
    let world = World {
        operations: Operation::all(&document),
        gateway,
        document,
        pool: Pool::default(),
        until: time.ok().map(|time| Instant::now() + time),
        seen: Mutex::default(),
    };
    join_all(
        (0..WORKERS as u64)
            .map(|number| work(&world, StdRng::seed_from_u64(seed.wrapping_add(number)))),
    )
    .await;

    // The gateway lives, and answers a message.
    let last = world
        .gateway
        .request(Method::POST, "/v1/users/last/messages")
        .bearer_auth(OPERATOR);
    let last = world
        .gateway
        .send(last.json(&json!({"content": "Are you still there?"})))
        .await
        .ok();
    assert_eq!(last["run"]["status"], "completed");
    let own = world
        .gateway
        .request(Method::GET, "/v1/users/alice/thread")
        .bearer_auth(ALICE);
    assert_ne!(
        world.gateway.send(own).await.status,
        StatusCode::UNAUTHORIZED
    );
    let told = world.seen.lock().unwrap();
    println!("answers: {:?}", told.statuses);
    assert!(
        told.faults.is_empty(),
        "{} faults:\n\n{}",
        told.faults.len(),
        told.faults.join("\n\n")
    );
    let (served, all) = (told.served.len(), world.operations.len());
    println!("served: {served} of {all} operations");
    assert!(
        served * 2 > all,
        "only {served} of {all} operations succeeded: this shows little"
    );
}

async fn work(world: &World, mut rng: StdRng) {
    let mut sent = 0;
    let goes_on = |sent| {
        world
            .until
            .map_or(sent < REQUESTS, |until| Instant::now() < until)
    };
    while goes_on(sent) && world.seen.lock().unwrap().faults.len() < ENOUGH {
        let request =
            Generator::new(&mut rng, &world.document, &world.pool).request(&world.operations);
        let answer = raw::send(world.gateway.address(), &request.bytes).await;
        let judged = answer.and_then(|answer| judge(world, &request, &answer));
        if let Err(fault) = judged {
            let sent = request.bytes.escape_ascii().to_string();
            let sent: String = sent.chars().take(3000).collect();
            world
                .seen
                .lock()
                .unwrap()
                .faults
                .push(format!("{fault}\nto: {sent}"));
        }
        sent += 1;
    }
}

/// Checks an answer. The error says what is wrong with it.
fn judge(world: &World, request: &Request, answer: &Response) -> Result<(), String> {
    let status = answer.status;
    *world
        .seen
        .lock()
        .unwrap()
        .statuses
        .entry(status.as_u16())
        .or_default() += 1;
    // A request that is not HTTP does not reach the routes.
    let is_bare = answer.body.is_empty() && !answer.headers.contains_key("x-request-id");
    if is_bare && request.may_be_no_http && [400, 414, 431].contains(&status.as_u16()) {
        return Ok(());
    }
    let body =
        String::from_utf8(answer.body.clone()).map_err(|_| "the body is not UTF-8".to_owned())?;
    if status.is_server_error() && !may_fail(&body) {
        return Err(format!("{status}: {body}"));
    }
    let method = request
        .method
        .parse::<Method>()
        .map_err(|error| error.to_string())?;
    contract::checked(&method, &request.path, status, &answer.headers, Some(&body))?;
    if request.is_good && status == StatusCode::BAD_REQUEST {
        return Err(format!("the document allows what cannot be read: {body}"));
    }
    if let Some(wrong) = request.wrong_body.as_ref().filter(|_| status.is_success()) {
        return Err(format!(
            "the body is taken ({status}) that the document does not allow: {wrong}"
        ));
    }
    if answer
        .headers
        .get("content-type")
        .is_some_and(|kind| kind == "text/event-stream")
    {
        for block in body
            .split_inclusive("\n\n")
            .filter(|block| block.ends_with("\n\n"))
        {
            if let Some(event) = event(block)? {
                contract::checked_event(&event)?;
            }
        }
    }
    if status.is_success() {
        world.pool.learn(&request.path, &body);
        world
            .seen
            .lock()
            .unwrap()
            .served
            .insert(request.operation.clone());
    }
    Ok(())
}

/// Whether the answer is the failure of a run that met its deadline: the caller's, or the one for
/// tool outputs.
fn may_fail(body: &str) -> bool {
    serde_json::from_str::<Value>(body).is_ok_and(|problem| problem["code"] == "deadline_exceeded")
}

/// Parses an event. Returns `None` for a comment.
fn event(block: &str) -> Result<Option<Event>, String> {
    if block.starts_with(':') {
        return Ok(None);
    }
    let field = |name: &str| {
        let value = block
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default();
        value.trim().to_owned()
    };
    let data =
        serde_json::from_str(&field("data:")).map_err(|error| format!("{error} in {block}"))?;
    Ok(Some(Event {
        id: field("id:"),
        name: field("event:"),
        data,
    }))
}
