//! An upstream that means harm is contained: what it sends costs bounded memory and time, nothing of it comes through,
//! and the thread is usable afterwards.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use threadkeeper::simulator::Stats;

use crate::support::gateway::{Answer, Gateway, text};
use crate::support::scene::{Protocol, Scene, on_every_scene};

// What is tried is the adapters, not the stores: one is enough.
on_every_scene!(@ assistants Assistants Sqlite [
    no_answer_to_a_run_harms
    no_answer_to_the_making_of_a_thread_harms
    no_answer_to_a_look_harms
    no_error_harms
    a_redirect_is_not_followed
    what_drips_for_ever_meets_the_deadline
]);
on_every_scene!(@ responses Responses Sqlite [
    no_answer_to_a_run_harms
    no_answer_to_the_making_of_a_thread_harms
    no_answer_to_a_look_harms
    no_error_harms
    a_redirect_is_not_followed
    what_drips_for_ever_meets_the_deadline
]);

/// Neither locks that may linger, nor repeats, nor rests are what is tried here.
const SETTINGS: &str = "[runs]\nsettle_timeout = \"2s\"\nmax_retries = 0\n";
const UPSTREAM: &str = "lock_window = \"100ms\"\nmax_failures = 0\n";
/// For what drips instead of an answer.
const SOON: &str = "lock_window = \"100ms\"\nmax_failures = 0\nidle_timeout = \"500ms\"\n";
/// What hostile answers may cost, one after the other: an event or a JSON answer of the length that it may have by default
/// (16 MiB), three times, for a buffer that grows is there twice at its last step, once at double length; and once more
/// for what the allocator keeps of the answer before, which another thread read.
const MAX_GROWTH_KIB: u64 = 4 * 16 * 1024;
/// The longest that an answer may take which nothing but the reader's patience ends. The machine may be busy.
const BOUND: Duration = Duration::from_secs(20);
/// A word that is in all that the simulator sends to harm.
const WORD: &str = "quagmire";

/// Watches what a process takes while it is treated badly.
struct Watch<'a> {
    gateway: &'a Gateway,
    before: u64,
}

impl<'a> Watch<'a> {
    /// A gateway that has answered `user` once.
    async fn over(gateway: &'a Gateway, user: &str) -> Self {
        gateway.say(&scope(user), "hello").await;
        Self { gateway, before: memory(gateway, "VmRSS:") }
    }

    /// `answer` is a refusal of this kind that came in time and tells nothing of what the upstream said.
    fn contained(&self, what: &str, since: Instant, answer: &Answer, expected: (u16, &str, &str)) {
        let (status, problem, code) = expected;
        assert_eq!(answer.problem(), (status, problem), "{what}: {:#}", answer.body);
        assert_eq!(answer.body["code"], code, "{what}: {:#}", answer.body);
        assert!(!answer.body.to_string().contains(WORD), "{what} came through: {:#}", answer.body);
        assert!(since.elapsed() < BOUND, "{what} took {:?}", since.elapsed());
        self.small(what);
    }

    fn small(&self, what: &str) {
        let grown = memory(self.gateway, "VmHWM:").saturating_sub(self.before);
        println!("after {what} the most memory so far is {grown} KiB more");
        assert!(grown <= MAX_GROWTH_KIB, "{what} took {grown} KiB of memory");
    }
}

fn scope(user: &str) -> String {
    format!("/v1/users/{user}")
}

async fn say(gateway: &Gateway, user: &str, body: &Value) -> Answer {
    gateway.post(&format!("{}/messages", scope(user)), body).await
}

/// The thread takes the next message.
async fn works_again(gateway: &Gateway, user: &str, what: &str) {
    let answer = say(gateway, user, &json!({"content": "and now?"})).await;
    assert_eq!(answer.status, 200, "after {what}: {:#}", answer.body);
    assert!(text(&answer.body["message"]).contains("and now?"), "after {what}: {:#}", answer.body);
    assert_eq!(answer.body["thread"]["state"], "idle", "after {what}");
}

/// A line of the process's status, KiB.
fn memory(gateway: &Gateway, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn nothing_came_through(gateway: &Gateway) {
    let line = gateway.logs().into_iter().find(|line| line.contains(&format!("{WORD} ")));
    assert_eq!(line, None, "what the upstream said is in the log");
}

async fn no_answer_to_a_run_harms(scene: Scene) {
    const UNREADABLE: (u16, &str, &str) = (502, "upstream-error", "upstream_error");
    const LATE: (u16, &str, &str) = (504, "upstream-timeout", "deadline_exceeded");
    let gateway = scene.gateway_both(SETTINGS, UPSTREAM).await;
    let watch = Watch::over(&gateway, "alice").await;
    for (kind, timeout_ms, expected) in [
        ("html", 60_000, UNREADABLE),
        ("redirect", 60_000, UNREADABLE),
        ("invalid_utf8", 60_000, UNREADABLE),
        ("deep_json", 60_000, UNREADABLE),
        ("endless_events", 700, LATE),
        ("drip", 300, LATE),
        ("endless_line", 60_000, UNREADABLE),
        ("huge_event", 60_000, UNREADABLE),
        ("gzip", 60_000, UNREADABLE),
        ("dense_json", 60_000, UNREADABLE),
        ("endless_reply", 60_000, UNREADABLE),
    ] {
        scene.fault("start", &format!("hostile={kind}"), 1);
        let since = Instant::now();
        let body = json!({"content": "oh", "timeout_ms": timeout_ms});
        let answer = say(&gateway, "alice", &body).await;
        watch.contained(kind, since, &answer, expected);
        let run = answer.body["run_id"].as_str().unwrap();
        let read = gateway.get(&format!("{}/runs/{run}", scope("alice"))).await.ok();
        let status = if expected == LATE { "expired" } else { "failed" };
        assert_eq!(read["run"]["status"], status, "{kind}: {read:#}");
        works_again(&gateway, "alice", kind).await;
        println!("{kind} took {:?}", since.elapsed());
    }
    nothing_came_through(&gateway);
}

async fn no_answer_to_the_making_of_a_thread_harms(scene: Scene) {
    let gateway = scene.gateway_both(SETTINGS, SOON).await;
    let watch = Watch::over(&gateway, "alice").await;
    for (kind, code) in [
        ("html", "upstream_error"),
        ("redirect", "upstream_error"),
        ("invalid_utf8", "upstream_error"),
        ("deep_json", "upstream_error"),
        ("gzip", "upstream_error"),
        ("dense_json", "upstream_error"),
        ("endless_line", "upstream_error"),
        ("endless_events", "upstream_error"),
        ("huge_event", "upstream_error"),
        ("drip", "upstream_timeout"),
    ] {
        scene.fault("create_thread", &format!("hostile={kind}"), 1);
        let since = Instant::now();
        let answer = say(&gateway, kind, &json!({"content": "oh"})).await;
        let expected =
            if code == "upstream_timeout" { (504, "upstream-timeout") } else { (502, "upstream-error") };
        watch.contained(kind, since, &answer, (expected.0, expected.1, code));
        works_again(&gateway, kind, kind).await;
        println!("{kind} took {:?}", since.elapsed());
    }
    nothing_came_through(&gateway);
}

/// A stream breaks, and whoever looks for what became of its run is answered so.
async fn no_answer_to_a_look_harms(scene: Scene) {
    let gateway = scene.gateway_both(SETTINGS, SOON).await;
    let watch = Watch::over(&gateway, "alice").await;
    let look = if scene.protocol == Protocol::Assistants { "get_run" } else { "list_items" };
    for kind in ["endless_line", "deep_json", "dense_json", "html", "drip"] {
        scene.fault(look, &format!("hostile={kind}"), 1);
        let since = Instant::now();
        let answer = say(&gateway, "alice", &json!({"content": "oh [[sim: cut=2 tokens=9 rate=1ms]]"})).await;
        // There the run goes on, and is followed to its end after the next look.
        if scene.protocol == Protocol::Assistants {
            assert!(text(&answer.ok()["message"]).contains("oh"));
            watch.small(kind);
        } else {
            watch.contained(kind, since, &answer, (502, "upstream-error", "stream_broken"));
        }
        works_again(&gateway, "alice", kind).await;
        println!("{kind} took {:?}", since.elapsed());
    }
    nothing_came_through(&gateway);
}

async fn no_error_harms(scene: Scene) {
    let gateway = scene.gateway_both(SETTINGS, SOON).await;
    let watch = Watch::over(&gateway, "alice").await;
    for kind in ["html", "deep_json", "dense_json", "gzip", "endless_line", "endless_events", "drip"] {
        scene.fault("start", &format!("status=400 hostile={kind}"), 1);
        let since = Instant::now();
        let answer = say(&gateway, "alice", &json!({"content": "oh"})).await;
        watch.contained(kind, since, &answer, (502, "upstream-error", "upstream_error"));
        works_again(&gateway, "alice", kind).await;
    }
    nothing_came_through(&gateway);
}

async fn a_redirect_is_not_followed(scene: Scene) {
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    target.set_nonblocking(true).unwrap();
    let location = format!("http://{}/v1", target.local_addr().unwrap());
    let gateway = scene.gateway_both(SETTINGS, UPSTREAM).await;
    for on in ["create_thread", "start"] {
        scene.fault(on, &format!("hostile=redirect location={location}"), 1);
        let answer = say(&gateway, on, &json!({"content": "oh"})).await;
        assert_eq!(answer.problem(), (502, "upstream-error"), "{on}");
        assert!(!answer.body.to_string().contains(&location), "{on}: {:#}", answer.body);
        works_again(&gateway, on, on).await;
    }
    let nobody = target.accept().err().map(|error| error.kind());
    assert_eq!(nobody, Some(std::io::ErrorKind::WouldBlock), "somebody came to where a redirect led");
}

async fn what_drips_for_ever_meets_the_deadline(scene: Scene) {
    // Each byte ends a silence, so that the longest one that is allowed never comes.
    let gateway = scene.gateway_both(SETTINGS, SOON).await;
    gateway.say(&scope("alice"), "hello").await;
    let since = Instant::now();
    let body = json!({"content": "oh [[sim: hostile=drip rate=50ms]]", "timeout_ms": 1500});
    let answer = say(&gateway, "alice", &body).await;
    assert_eq!(answer.problem(), (504, "upstream-timeout"));
    assert_eq!(answer.body["code"], "deadline_exceeded", "{:#}", answer.body);
    let took = since.elapsed();
    assert!(took >= Duration::from_millis(1500) && took < BOUND, "it took {took:?}");
    works_again(&gateway, "alice", "drip").await;

    // A message behind it in the line has its turn.
    let begun = |stats: &Stats| {
        let of = |name: &str| stats.requests_by_operation.get(name).copied().unwrap_or(0);
        of("create_run") + of("create_response")
    };
    let before = begun(&scene.simulator.stats());
    let first = gateway.post_in_background(
        &format!("{}/messages", scope("alice")),
        &json!({"content": "oh [[sim: hostile=drip]]", "timeout_ms": 700}),
    );
    let begins = scene.simulator.wait_for(|stats| begun(stats) > before);
    tokio::time::timeout(BOUND, begins).await.expect("it begins");
    works_again(&gateway, "alice", "drip").await;
    drop(first);
}
