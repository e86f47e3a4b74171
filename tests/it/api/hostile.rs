//! A hostile upstream is contained. Its answers cost bounded memory and time, none of its text
//! reaches a caller, and the thread is usable afterwards.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use threadkeeper::simulator::Stats;

use crate::support::gateway::{Answer, Gateway, text};
use crate::support::scene::{Backend, Protocol, Scene};

/// Makes a test of each function for a way to use the upstream, which may need further settings.
/// One store is enough, since the adapters are tested.
macro_rules! on_every_way {
    ($($module:ident $protocol:ident $more:literal [$($case:ident)+])+) => {$(
        mod $module {
            use super::{Backend, Protocol, Scene, Way};
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $case() {
                    let scene = Scene::new(Protocol::$protocol, Backend::Sqlite).await;
                    super::$case(Way { scene, more: $more }).await;
                }
            )+
        }
    )+};
}
on_every_way! {
    assistants Assistants "" [
        hostile_run_answers_are_contained
        hostile_thread_creation_answers_are_contained
        hostile_lookup_answers_are_contained
        endless_lists_are_contained
        hostile_error_bodies_are_contained
        redirect_is_not_followed
        dripping_reply_expires_run_at_deadline
    ]
    responses Responses "" [
        hostile_run_answers_are_contained
        hostile_thread_creation_answers_are_contained
        hostile_lookup_answers_are_contained
        endless_lists_are_contained
        hostile_error_bodies_are_contained
        redirect_is_not_followed
        dripping_reply_expires_run_at_deadline
    ]
    // In this way the gateway polls a response by its id.
    background Responses "background = true\n" [
        hostile_run_answers_are_contained
        hostile_lookup_answers_are_contained
        hostile_error_bodies_are_contained
        redirect_is_not_followed
        dripping_reply_expires_run_at_deadline
    ]
    // In this way the gateway creates no upstream thread and reads no list.
    chain Chain "" [
        hostile_run_answers_are_contained
        hostile_lookup_answers_are_contained
        hostile_error_bodies_are_contained
        redirect_is_not_followed
        dripping_reply_expires_run_at_deadline
    ]
}

/// A way to use the upstream.
struct Way {
    scene: Scene,
    /// Settings of the upstream for this way.
    more: &'static str,
}

impl Way {
    async fn gateway(&self, upstream: &str) -> Gateway {
        self.scene
            .gateway_both(SETTINGS, &format!("{upstream}{}", self.more))
            .await
    }

    fn is_background(&self) -> bool {
        !self.more.is_empty()
    }

    /// Returns the operation that looks up a run whose stream broke.
    fn look(&self) -> &'static str {
        match self.scene.protocol {
            Protocol::Assistants => "get_run",
            Protocol::Responses if !self.is_background() => "list_items",
            _ => "get_response",
        }
    }
}

/// Settings without long locks, retries or the breaker, which are not tested here.
const SETTINGS: &str = "[runs]\nsettle_timeout = \"2s\"\nmax_retries = 0\n";
const UPSTREAM: &str = "lock_window = \"100ms\"\nbreaker_min_requests = 0\n";
/// Settings for a look-up whose answer drips.
const SOON: &str = "lock_window = \"100ms\"\nbreaker_min_requests = 0\ncall_timeout = \"500ms\"\n";
/// Largest growth of the process in KiB, after one hostile answer after the other. An event or a
/// JSON answer may have 16 MiB by default. It counts three times: a growing buffer exists twice
/// at its last step, once at double length. Two more are for memory that the allocator keeps of
/// earlier answers, which other threads read.
const MAX_GROWTH_KIB: u64 = 5 * 16 * 1024;
/// Longest time until an answer that only a time limit ends. It is long, since the machine may be
/// busy.
const BOUND: Duration = Duration::from_secs(20);
/// A word in every hostile text of the simulator.
const WORD: &str = "quagmire";

/// Watches the memory of a process during hostile answers.
struct Watch<'a> {
    gateway: &'a Gateway,
    before: u64,
    /// Largest growth in KiB.
    most: u64,
}

impl<'a> Watch<'a> {
    /// Watches a gateway, which has answered one message of `user`.
    async fn over(gateway: &'a Gateway, user: &str) -> Self {
        gateway.say(&scope(user), "hello").await;
        Self {
            gateway,
            before: memory(gateway, "VmRSS:"),
            most: MAX_GROWTH_KIB,
        }
    }

    /// Checks that a message with a hostile answer is refused as expected, in time, and without
    /// the upstream's text. The thread must then accept the next message. `what` names the
    /// hostile answer.
    async fn refused(
        &self,
        what: &str,
        user: &str,
        message: &Value,
        expected: (u16, &str, &str),
    ) -> Answer {
        let since = Instant::now();
        let (status, problem, code) = expected;
        let answer = say(self.gateway, user, message).await;
        assert_eq!(
            answer.problem(),
            (status, problem),
            "{what}: {:#}",
            answer.body
        );
        assert_eq!(answer.body["code"], code, "{what}: {:#}", answer.body);
        self.contained(what, user, since, &answer).await;
        answer
    }

    async fn contained(&self, what: &str, user: &str, since: Instant, answer: &Answer) {
        assert!(
            !answer.body.to_string().contains(WORD),
            "text of {what} reached the caller: {:#}",
            answer.body
        );
        assert!(since.elapsed() < BOUND, "{what} took {:?}", since.elapsed());
        self.small(what);
        works_again(self.gateway, user, what).await;
        println!("{what} took {:?}", since.elapsed());
    }

    fn small(&self, what: &str) {
        let grown = memory(self.gateway, "VmHWM:").saturating_sub(self.before);
        println!("after {what} the largest memory so far is {grown} KiB more");
        assert!(grown <= self.most, "{what} cost {grown} KiB of memory");
    }
}

fn scope(user: &str) -> String {
    format!("/v1/users/{user}")
}

async fn say(gateway: &Gateway, user: &str, body: &Value) -> Answer {
    gateway
        .post(&format!("{}/messages", scope(user)), body)
        .await
}

/// Checks that the thread accepts the next message.
async fn works_again(gateway: &Gateway, user: &str, what: &str) {
    let answer = say(gateway, user, &json!({"content": "and now?"})).await;
    assert_eq!(answer.status, 200, "after {what}: {:#}", answer.body);
    assert!(
        text(&answer.body["message"]).contains("and now?"),
        "after {what}: {:#}",
        answer.body
    );
    assert_eq!(answer.body["thread"]["state"], "idle", "after {what}");
}

/// Returns a line of the process's status, in KiB.
fn memory(gateway: &Gateway, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn nothing_came_through(gateway: &Gateway) {
    let line = gateway
        .logs()
        .into_iter()
        .find(|line| line.contains(&format!("{WORD} ")));
    assert_eq!(line, None, "the log contains text of the upstream");
}

const UNREADABLE: (u16, &str, &str) = (502, "upstream-error", "upstream_error");
const REDIRECTED: (u16, &str, &str) = (502, "upstream-error", "upstream_misconfigured");
const FORBIDDEN: (u16, &str, &str) = (502, "upstream-error", "upstream_unauthorized");
const BROKEN: (u16, &str, &str) = (502, "upstream-error", "stream_broken");
const LATE: (u16, &str, &str) = (504, "upstream-timeout", "deadline_exceeded");

async fn hostile_run_answers_are_contained(way: Way) {
    let gateway = way.gateway(UPSTREAM).await;
    let watch = Watch::over(&gateway, "alice").await;
    for (kind, timeout_ms, expected) in [
        ("html", 60_000, UNREADABLE),
        ("redirect", 60_000, REDIRECTED),
        ("invalid_utf8", 60_000, UNREADABLE),
        ("deep_json", 60_000, UNREADABLE),
        ("endless_events", 700, LATE),
        ("drip", 300, LATE),
        ("endless_line", 60_000, UNREADABLE),
        ("huge_event", 60_000, UNREADABLE),
        ("gzip", 60_000, UNREADABLE),
        ("dense_json", 60_000, UNREADABLE),
        ("nested_json", 60_000, UNREADABLE),
        ("endless_reply", 60_000, UNREADABLE),
    ] {
        way.scene.fault("start", &format!("hostile={kind}"), 1);
        let message = json!({"content": "oh", "timeout_ms": timeout_ms});
        let answer = watch.refused(kind, "alice", &message, expected).await;
        let run = answer.body["run_id"].as_str().unwrap();
        let read = gateway
            .get(&format!("{}/runs/{run}", scope("alice")))
            .await
            .ok();
        let status = if expected == LATE {
            "expired"
        } else {
            "failed"
        };
        assert_eq!(read["run"]["status"], status, "{kind}: {read:#}");
    }
    nothing_came_through(&gateway);
}

async fn hostile_thread_creation_answers_are_contained(way: Way) {
    let gateway = way.gateway(SOON).await;
    let watch = Watch::over(&gateway, "alice").await;
    for kind in [
        "html",
        "redirect",
        "invalid_utf8",
        "deep_json",
        "gzip",
        "dense_json",
        "nested_json",
        "endless_line",
        "endless_events",
        "huge_event",
        "drip",
    ] {
        way.scene
            .fault("create_thread", &format!("hostile={kind}"), 1);
        // The creation would be paid for and lost, so the gateway waits for it.
        let (timeout_ms, expected) = match kind {
            "drip" => (700, LATE),
            "redirect" => (60_000, REDIRECTED),
            _ => (60_000, UNREADABLE),
        };
        watch
            .refused(
                kind,
                kind,
                &json!({"content": "oh", "timeout_ms": timeout_ms}),
                expected,
            )
            .await;
    }
    nothing_came_through(&gateway);
}

/// A stream breaks, and the look-up of its run gets this answer.
async fn hostile_lookup_answers_are_contained(way: Way) {
    let gateway = way.gateway(SOON).await;
    let watch = Watch::over(&gateway, "alice").await;
    for kind in [
        "endless_line",
        "deep_json",
        "dense_json",
        "nested_json",
        "html",
        "drip",
    ] {
        way.scene.fault(way.look(), &format!("hostile={kind}"), 1);
        let message = json!({"content": "oh [[sim: cut=2 tokens=9 rate=1ms]]"});
        // Where the run continues, the next look-up follows it to its end.
        if way.scene.protocol == Protocol::Assistants || way.is_background() {
            let since = Instant::now();
            let answer = say(&gateway, "alice", &message).await;
            watch.contained(kind, "alice", since, &answer).await;
            assert!(text(&answer.ok()["message"]).contains("oh"));
        } else {
            watch.refused(kind, "alice", &message, BROKEN).await;
        }
    }
    nothing_came_through(&gateway);
}

/// Lists have full pages, and each page announces another one.
async fn endless_lists_are_contained(way: Way) {
    let settings = SETTINGS.replace("\"2s\"", "\"20s\"");
    let gateway = way
        .scene
        .gateway_both(&settings, &format!("{UPSTREAM}{}", way.more))
        .await;
    // A page is kept while the next one is read. A comparison with the transcript needs twice as
    // much.
    let watch = Watch {
        most: 2 * MAX_GROWTH_KIB,
        ..Watch::over(&gateway, "alice").await
    };
    let list = if way.scene.protocol == Protocol::Assistants {
        "list_messages"
    } else {
        "list_items"
    };
    way.scene.fault(list, "hostile=full_page", 1000);
    let said = say(
        &gateway,
        "alice",
        &json!({"content": "oh [[sim: cut=2 tokens=9 rate=1ms]]"}),
    )
    .await;
    watch.small("a broken stream");
    assert!(said.status == 200 || said.status == 502, "{said:?}");
    let since = Instant::now();
    let verified = gateway
        .get(&format!("{}/thread?verify=upstream", scope("alice")))
        .await;
    assert!(
        since.elapsed() < BOUND,
        "the answer took {:?}",
        since.elapsed()
    );
    assert_eq!(verified.ok()["verified"]["upstream_thread"], "cannot_tell");
    watch.small("a comparison");
    way.scene.simulator.clear_faults();
    works_again(&gateway, "alice", list).await;
    nothing_came_through(&gateway);
}

async fn hostile_error_bodies_are_contained(way: Way) {
    let gateway = way.gateway(SOON).await;
    let watch = Watch::over(&gateway, "alice").await;
    for kind in [
        "html",
        "deep_json",
        "dense_json",
        "nested_json",
        "gzip",
        "endless_line",
        "endless_events",
        "drip",
    ] {
        way.scene
            .fault("start", &format!("status=403 hostile={kind}"), 1);
        watch
            .refused(kind, "alice", &json!({"content": "oh"}), FORBIDDEN)
            .await;
    }
    nothing_came_through(&gateway);
}

async fn redirect_is_not_followed(way: Way) {
    let target = TcpListener::bind("127.0.0.1:0").unwrap();
    target.set_nonblocking(true).unwrap();
    let location = format!("http://{}/v1", target.local_addr().unwrap());
    let gateway = way.gateway(UPSTREAM).await;
    let makes_threads = way.scene.protocol != Protocol::Chain;
    for on in ["create_thread", "start"]
        .into_iter()
        .filter(|on| makes_threads || *on == "start")
    {
        way.scene
            .fault(on, &format!("hostile=redirect location={location}"), 1);
        let answer = say(&gateway, on, &json!({"content": "oh"})).await;
        assert_eq!(answer.problem(), (502, "upstream-error"), "{on}");
        assert!(
            !answer.body.to_string().contains(&location),
            "{on}: {:#}",
            answer.body
        );
        works_again(&gateway, on, on).await;
    }
    let nobody = target.accept().err().map(|error| error.kind());
    assert_eq!(
        nobody,
        Some(std::io::ErrorKind::WouldBlock),
        "a client followed the redirect"
    );
}

async fn dripping_reply_expires_run_at_deadline(way: Way) {
    // Each byte ends a silence, so that no silence reaches its limit.
    let gateway = way.gateway(SOON).await;
    gateway.say(&scope("alice"), "hello").await;
    let since = Instant::now();
    let body = json!({"content": "oh [[sim: hostile=drip rate=50ms]]", "timeout_ms": 1500});
    let answer = say(&gateway, "alice", &body).await;
    assert_eq!(answer.problem(), (504, "upstream-timeout"));
    assert_eq!(
        answer.body["code"], "deadline_exceeded",
        "{:#}",
        answer.body
    );
    let took = since.elapsed();
    assert!(
        took >= Duration::from_millis(1500) && took < BOUND,
        "the answer took {took:?}"
    );
    works_again(&gateway, "alice", "drip").await;

    // A queued message behind it starts.
    let begun = |stats: &Stats| {
        let of = |name: &str| stats.requests_by_operation.get(name).copied().unwrap_or(0);
        of("create_run") + of("create_response")
    };
    let before = begun(&way.scene.simulator.stats());
    let first = gateway.post_in_background(
        &format!("{}/messages", scope("alice")),
        &json!({"content": "oh [[sim: hostile=drip]]", "timeout_ms": 700}),
    );
    let begins = way.scene.simulator.wait_for(|stats| begun(stats) > before);
    tokio::time::timeout(BOUND, begins)
        .await
        .expect("the queued run starts");
    works_again(&gateway, "alice", "drip").await;
    drop(first);
}
