//! Measures whether the time of a 404 reveals that another tenant has the requested thing.

use std::time::Duration;

use tokio::time::Instant;

use super::Args;
use super::connection::{Connection, post};
use super::figures::{Durations, count, micros};
use super::setting::{Kind, Setting};

const OWNER: &str = "the-key-of-one-tenant-of-two";
const OTHER: &str = "the-key-of-the-other-tenant";

/// Requests of a caller from another tenant. `{}` stands for an id.
const QUESTIONS: [&str; 3] = [
    "/v1/users/alice/runs/{}",
    "/v1/users/alice/runs/{}/events",
    "/v1/threads/{}/messages",
];

pub(crate) async fn report(args: &Args, database: Kind) {
    let settings = format!(
        "[auth.keys.owner]\nkey = \"{OWNER}\"\ntenant = \"one\"\nscope = \"admin\"\n\
         [auth.keys.other]\nkey = \"{OTHER}\"\ntenant = \"two\"\nscope = \"admin\"\n"
    );
    let setting = Setting::new(database, !args.share, &[], &settings).await;
    let mut connection = Connection::open(setting.gateway.address).await;
    let head = format!("authorization: Bearer {OWNER}\r\n");
    let message = post("/v1/users/alice/messages", &head, "{\"content\":\"hello\"}");
    assert_eq!(connection.ask(&message).await, Some(200));
    let answer: serde_json::Value = serde_json::from_slice(connection.body()).unwrap();
    for question in QUESTIONS {
        let kind = if question.contains("threads") {
            "thread"
        } else {
            "run"
        };
        let id = answer[kind]["id"].as_str().unwrap();
        let [there, absent, control] = compare(args, &mut connection, question, id).await;
        let longer = |times: &[Duration]| {
            let longer = times
                .iter()
                .zip(&absent)
                .filter(|(one, other)| one > other)
                .count();
            100.0 * count(longer) / count(times.len())
        };
        let half = |times: &[Duration]| micros(times.iter().copied().collect::<Durations>().p50());
        println!(
            "{database:?}, {question}: there {:.1} µs, absent {:.1} µs (medians of {}); the former takes longer in {:.1} % of \
             pairs, an absent one beside an absent one in {:.1} %",
            half(&there),
            half(&absent),
            there.len(),
            longer(&there),
            longer(&control)
        );
    }
}

/// Measures three ids in rotation: another tenant's id, an id that nobody has, and another id
/// that nobody has.
async fn compare(
    args: &Args,
    connection: &mut Connection,
    question: &str,
    there: &str,
) -> [Vec<Duration>; 3] {
    let ids = [there.to_owned(), unknown(there, 'a'), unknown(there, 'b')];
    let requests = ids.map(|id| {
        let path = question.replace("{}", &id);
        format!("GET {path} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {OTHER}\r\n\r\n")
    });
    let (mut times, begun) = ([vec![], vec![], vec![]], Instant::now());
    // Each id is first equally often.
    for first in 0.. {
        if begun.elapsed() >= args.time {
            break;
        }
        for at in (0..3).map(|at| (first + at) % 3) {
            let since = Instant::now();
            assert_eq!(
                connection.ask(&requests[at]).await,
                Some(404),
                "{}",
                requests[at]
            );
            times[at].push(since.elapsed());
        }
    }
    times
}

/// Returns an id that differs from this one in its last character.
fn unknown(id: &str, last: char) -> String {
    let mut id = id.to_owned();
    let last = if id.ends_with(last) { 'c' } else { last };
    id.pop();
    id.push(last);
    id
}
