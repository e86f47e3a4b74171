//! Comparisons for the gateway: the same callers at the upstream alone and through a plain proxy,
//! and two bare calls to the database.

use std::sync::Arc;

use serde_json::{Value, json};

use super::Args;
use super::answers::Answers;
use super::callers::Callers;
use super::connection::{Connection, post};
use super::figures::{count, median_of, micros};
use super::nginx::Nginx;
use super::setting::{Kind, Setting};
use super::turns::USERS;
use super::{floor, nginx};

/// The credentials that the simulator requires.
const KEY: &str = "authorization: Bearer sk-bench\r\n";

pub(crate) async fn report(args: &Args, database: Kind) {
    let setting = Setting::new(database, !args.share, &[], "").await;
    let callers = setting.known_callers(USERS).await;
    let proxy = nginx::binary().map(|binary| Nginx::start(&binary, setting.gateway.address));
    if proxy.is_none() {
        println!("nginx is not installed: there is no proxy to compare with");
    }
    let mut peers = vec![(
        "the simulator alone".to_owned(),
        callers_of_the_upstream(&setting).await,
    )];
    for form in &args.form {
        let callers = callers.who_ask_for(*form);
        if let Some(proxy) = &proxy {
            peers.push((
                format!("{form:?}, nginx and the gateway"),
                callers.who_go_by(proxy.address),
            ));
        }
        peers.push((format!("{form:?}, the gateway"), callers));
    }
    for at_once in &args.callers {
        let mut answers: Vec<Vec<Answers>> = peers.iter().map(|_| vec![]).collect();
        // The peers alternate, so that they share the machine's good and bad moments.
        for _ in 0..args.rounds {
            for ((_, callers), answers) in peers.iter().zip(&mut answers) {
                answers.push(callers.keep_asking(*at_once, args.time).await);
            }
        }
        for ((name, _), answers) in peers.iter().zip(answers) {
            println!("{database:?}, {name}, {at_once} at once:");
            print(&answers);
        }
    }
    if database == Kind::Postgres {
        floor::report(args).await;
    }
}

/// Prints the medians of the rounds.
fn print(rounds: &[Answers]) {
    println!(
        "  {:.0} turns/s; time to the answer: p50 {:.0} µs, p99 {:.0} µs; {:.0} not answered with a reply",
        median_of(rounds, Answers::rate),
        median_of(rounds, |it| micros(it.taken.p50())),
        median_of(rounds, |it| micros(it.taken.p99())),
        median_of(rounds, |it| count(it.len() - it.taken.len()))
    );
    if rounds.iter().any(|it| it.first.len() > 0) {
        println!(
            "  time to the first token: p50 {:.0} µs, p99 {:.0} µs",
            median_of(rounds, |it| micros(it.first.p50())),
            median_of(rounds, |it| micros(it.first.p99()))
        );
    }
}

/// Returns callers who send the simulator what the gateway would send for a turn, each in their
/// own conversation.
async fn callers_of_the_upstream(setting: &Setting) -> Callers {
    let address = setting.simulator.address;
    let mut connection = Connection::open(address).await;
    let mut conversations = Vec::with_capacity(USERS);
    for _ in 0..USERS {
        assert_eq!(
            connection.ask(&post("/v1/conversations", KEY, "{}")).await,
            Some(200)
        );
        let conversation: Value = serde_json::from_slice(connection.body()).unwrap();
        conversations.push(conversation["id"].as_str().unwrap().to_owned());
    }
    Callers::new(address, USERS).who_send(Arc::new(move |n| {
        let body = json!({
            "model": "gpt-5",
            "conversation": conversations[n % USERS],
            "metadata": {"threadkeeper_run": format!("run_{n:032}")},
            "store": true,
            "stream": true,
            "stream_options": {"include_obfuscation": false},
            "input": [{"type": "message", "role": "user", "content": "hello"}],
        });
        post("/v1/responses", KEY, &body.to_string())
    }))
}
