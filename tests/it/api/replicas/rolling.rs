//! Replicas are restarted one after the other while users send messages.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};

use super::{user_messages, whole};
use crate::support::gateway::{Event, EventReader, PATIENCE, text_of};
use crate::support::history::{assert_same, messages};
use crate::support::scene::{Protocol, Scene, on_shared_scene_by_chance};

on_shared_scene_by_chance!(
    rolling_restart_neither_loses_nor_doubles_messages,
    hasty_rolling_restart_neither_loses_nor_doubles_messages
);

const REPLICAS: usize = 3;
const USERS: usize = 6;

async fn rolling_restart_neither_loses_nor_doubles_messages(scene: Scene) {
    roll(scene, "20s", "").await;
}

/// The grace time is so short that many active runs are handed over half-way. That needs an
/// upstream on which a reply outlives its client.
async fn hasty_rolling_restart_neither_loses_nor_doubles_messages(scene: Scene) {
    let upstream = if scene.protocol == Protocol::Assistants {
        ""
    } else {
        "background = true\nlock_window = \"20s\"\n"
    };
    roll(scene, "400ms", upstream).await;
}

async fn roll(scene: Scene, grace: &str, upstream: &str) {
    let settings =
        format!("[replica]\nsession_ttl = \"30s\"\n[server]\nshutdown_grace = \"{grace}\"\n");
    let start = || scene.gateway_both(&settings, upstream);
    let mut gateways = join_all((0..REPLICAS).map(|_| start())).await;
    let balancer = Balancer::default();
    *balancer.replicas.lock().unwrap() =
        gateways.iter().map(|it| it.address().to_owned()).collect();
    let over = AtomicBool::new(false);
    let users = join_all((0..USERS).map(|user| talk(&balancer, user, &over)));
    let restarts = async {
        for (n, gateway) in gateways.iter_mut().enumerate() {
            // The users are busy when the restart begins.
            let talked = balancer.answered.load(Ordering::SeqCst) + USERS;
            balancer.until_answered(talked).await;
            gateway.terminate();
            assert!(gateway.exit().await.success());
            *gateway = start().await;
            gateway
                .address()
                .clone_into(&mut balancer.replicas.lock().unwrap()[n]);
        }
        balancer
            .until_answered(balancer.answered.load(Ordering::SeqCst) + USERS)
            .await;
        over.store(true, Ordering::SeqCst);
        gateways
    };
    let (said, gateways) = tokio::join!(users, restarts);
    for (user, said) in said.iter().enumerate() {
        let scope = format!("/v1/users/user-{user}");
        let words: Vec<_> = said.iter().map(|(word, _)| word.clone()).collect();
        assert_eq!(
            user_messages(&gateways[0], &scope).await,
            words,
            "each message is in the transcript once, in order"
        );
        let replies = messages(&gateways[1], &scope).await;
        let replies = replies
            .iter()
            .filter(|message| message["role"] == "assistant")
            .map(whole);
        let told: Vec<_> = said.iter().map(|(_, reply)| reply.clone()).collect();
        assert_eq!(
            replies.collect::<Vec<_>>(),
            told,
            "each reply is in the transcript once, as its reader saw it"
        );
        assert_same(&scene, &gateways[2], &scope).await;
    }
    let all: usize = said.iter().map(Vec::len).sum();
    assert_eq!(
        scene.simulator.stats().runs_started,
        all as u64,
        "each message ran once"
    );
}

/// Sends messages until the test is over. Returns each message with its reply.
async fn talk(balancer: &Balancer, user: usize, over: &AtomicBool) -> Vec<(String, String)> {
    let mut said = Vec::new();
    while !over.load(Ordering::SeqCst) {
        let word = format!("word {} of {user}", said.len());
        let scope = format!("/v1/users/user-{user}");
        let streams = said.len().is_multiple_of(2);
        let body =
            json!({"content": format!("{word} [[sim: tokens=24 rate=30ms]]"), "stream": streams});
        let key = format!("key-{}", said.len());
        let response = balancer.send(|client, address| {
            let request = client.post(format!("http://{address}{scope}/messages"));
            request.header("idempotency-key", &key).json(&body)
        });
        let response = response.await;
        assert!(
            response.status().is_success(),
            "{:?}",
            response.text().await
        );
        let reply = if streams {
            balancer.streamed(response).await
        } else {
            balancer.reply_of(response).await
        };
        assert!(reply.contains(&word), "{word}: {reply}");
        said.push((word, reply));
        balancer.answered.fetch_add(1, Ordering::SeqCst);
    }
    said
}

/// Sends requests to the replicas in rotation, as a load balancer and a careful client do
/// together. It tries the next replica if the message was refused, or if the connection broke
/// before an answer. Each message has a key, so the second case is safe.
#[derive(Default)]
struct Balancer {
    replicas: Mutex<Vec<String>>,
    next: AtomicUsize,
    answered: AtomicUsize,
    client: Client,
}

impl Balancer {
    async fn send(&self, request: impl Fn(&Client, &str) -> RequestBuilder) -> Response {
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < PATIENCE, "no replica accepts the message");
            let address = {
                let replicas = self.replicas.lock().unwrap();
                replicas[self.next.fetch_add(1, Ordering::SeqCst) % replicas.len()].clone()
            };
            // Each request has its own connection, so that none uses one that is being closed.
            match request(&self.client, &address)
                .header("connection", "close")
                .send()
                .await
            {
                Ok(response) if response.status() == StatusCode::SERVICE_UNAVAILABLE => {
                    let body: Value = response.json().await.unwrap();
                    assert_eq!(
                        body["type"], "urn:threadkeeper:problem:draining",
                        "{body:#}"
                    );
                }
                Ok(response) => return response,
                // A process may end without having refused a connection.
                Err(error) => assert!(error.is_connect() || error.is_request(), "{error:?}"),
            }
        }
    }

    /// Returns the reply to a request that waits for it.
    async fn reply_of(&self, response: Response) -> String {
        if response.status() == StatusCode::OK {
            let answer: Value = response.json().await.unwrap();
            return whole(&answer["message"]);
        }
        assert_eq!(response.status(), StatusCode::ACCEPTED);
        let place = response.headers()["location"].to_str().unwrap().to_owned();
        let start = Instant::now();
        loop {
            let get = self.send(|client, address| {
                client.request(Method::GET, format!("http://{address}{place}"))
            });
            let answer: Value = get.await.json().await.unwrap();
            if answer["run"]["finished_at"].is_string() {
                assert_eq!(answer["run"]["status"], "completed", "{answer:#}");
                return whole(&answer["message"]);
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the run never ended: {answer:#}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Returns the reply of a stream, which may continue at another replica.
    async fn streamed(&self, response: Response) -> String {
        let mut events: Vec<Event> = Vec::new();
        let mut stream = EventReader::new(response);
        loop {
            while let Some(event) = stream.next().await {
                events.push(event);
            }
            let end = events.last().unwrap().clone();
            if end.name != "stream.reconnect" {
                assert_eq!(end.name, "run.completed", "{events:#?}");
                let text = text_of(&events);
                assert_eq!(
                    text,
                    super::completed(&events),
                    "the deltas give the whole reply, once"
                );
                return text;
            }
            events.pop();
            let path = end.data["events"].as_str().unwrap().to_owned();
            let after = events.last().map(|event| event.id.clone());
            let more = self.send(|client, address| {
                let request = client.get(format!("http://{address}{path}"));
                match &after {
                    Some(after) => request.header("last-event-id", after),
                    None => request,
                }
            });
            stream = EventReader::new(more.await);
        }
    }

    async fn until_answered(&self, wanted: usize) {
        let start = Instant::now();
        while self.answered.load(Ordering::SeqCst) < wanted {
            assert!(start.elapsed() < PATIENCE, "no user gets answers any more");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
