//! Callers that use as little of the machine as possible, so that it is busy with the measured
//! processes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::ValueEnum;
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::sync::{Barrier, Mutex};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep};

use super::answers::Answers;
use super::connection::{Connection, post};

/// Number of connections of an open loop.
const CONNECTIONS: usize = 1024;

/// The kind of message that callers send.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(crate) enum Form {
    /// A message in an existing conversation, answered in JSON.
    #[default]
    Known,
    /// The first message of a new conversation.
    New,
    /// The same as `known` with an `Idempotency-Key`.
    Keyed,
    /// The same as `known`, answered as a stream of events.
    Stream,
}

/// Makes the request with this number.
type Requests = Arc<dyn Fn(usize) -> String + Send + Sync>;

/// Users whose messages go over kept connections.
#[derive(Clone)]
pub(crate) struct Callers {
    address: SocketAddr,
    /// Prefix of the users' keys.
    name: &'static str,
    users: usize,
    next: Arc<AtomicUsize>,
    /// Further lines of the request's head.
    head: String,
    content: String,
    form: Form,
    /// Makes other requests than messages to the gateway.
    requests: Option<Requests>,
    /// Pause after a message that got no reply.
    pause: Duration,
}

impl Callers {
    pub(crate) fn new(address: SocketAddr, users: usize) -> Self {
        let (head, content) = (String::new(), "hello".to_owned());
        let (form, pause) = (Form::default(), Duration::ZERO);
        Self {
            address,
            name: "user",
            users,
            next: Arc::default(),
            head,
            content,
            form,
            requests: None,
            pause,
        }
    }

    pub(crate) fn who_are(self, name: &'static str) -> Self {
        Self { name, ..self }
    }

    pub(crate) fn with_head(self, head: &str) -> Self {
        Self {
            head: head.to_owned(),
            ..self
        }
    }

    pub(crate) fn who_say(self, content: String) -> Self {
        Self { content, ..self }
    }

    pub(crate) fn who_ask_for(&self, form: Form) -> Self {
        Self {
            form,
            ..self.clone()
        }
    }

    /// The same callers, who reach the gateway through a proxy.
    pub(crate) fn who_go_by(&self, proxy: SocketAddr) -> Self {
        Self {
            address: proxy,
            ..self.clone()
        }
    }

    /// The same callers, who send other requests than messages to the gateway.
    pub(crate) fn who_send(self, requests: Requests) -> Self {
        Self {
            requests: Some(requests),
            ..self
        }
    }

    pub(crate) fn who_pause(self, pause: Duration) -> Self {
        Self { pause, ..self }
    }

    /// Sends one message of each user.
    pub(crate) async fn each_once(&self) {
        let share = self.users.div_ceil(8);
        let mut tasks = JoinSet::new();
        for _ in 0..8 {
            let callers = self.clone();
            tasks.spawn(async move {
                let mut connection = callers.connect().await;
                for _ in 0..share {
                    assert_eq!(
                        connection.ask(&callers.message()).await,
                        Some(200),
                        "each first message gets a reply"
                    );
                }
            });
        }
        tasks.join_all().await;
    }

    pub(crate) async fn connect(&self) -> Connection {
        Connection::open(self.address).await
    }

    /// Sends one message.
    pub(crate) async fn ask(&self) -> Option<u16> {
        self.connect().await.ask(&self.message()).await
    }

    /// Lets `callers` callers send messages, each the next one once the last one is answered.
    pub(crate) async fn keep_asking(&self, callers: usize, time: Duration) -> Answers {
        let (begun, mut tasks) = (Instant::now(), JoinSet::new());
        for _ in 0..callers {
            let this = self.clone();
            tasks.spawn(async move {
                let (mut connection, mut asked) = (this.connect().await, Vec::new());
                while begun.elapsed() < time {
                    let one = connection.timed(&this.message(), Instant::now()).await;
                    asked.push(one);
                    if one.status != Some(200) && !this.pause.is_zero() {
                        sleep(this.pause).await;
                    }
                }
                asked
            });
        }
        let asked = tasks.join_all().await.into_iter().flatten();
        Answers::within(begun, begun.elapsed(), asked)
    }

    /// Sends `rate` messages a second in an open loop. A message that is due while all
    /// connections are busy waits, and its latency counts from its due time. Messages of the
    /// first `onset` do not count.
    pub(crate) async fn arrive(&self, rate: f64, onset: Duration, time: Duration) -> Answers {
        let (send, arrivals) = mpsc::unbounded_channel();
        let arrivals = Arc::new(Mutex::new(arrivals));
        let ready = Arc::new(Barrier::new(CONNECTIONS + 1));
        let mut tasks = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (this, arrivals, ready) = (self.clone(), Arc::clone(&arrivals), Arc::clone(&ready));
            tasks.spawn(async move {
                let (mut connection, mut asked) = (this.connect().await, Vec::new());
                ready.wait().await;
                loop {
                    let Some(due) = arrivals.lock().await.recv().await else {
                        return asked;
                    };
                    asked.push(connection.timed(&this.message(), due).await);
                }
            });
        }
        ready.wait().await;
        let begun = Instant::now();
        let ticks = spawn_blocking(move || tick(&send, begun, rate, onset + time));
        let asked = tasks.join_all().await.into_iter().flatten();
        ticks.await.unwrap();
        Answers::within(begun + onset, time, asked)
    }

    /// Returns the next user's message.
    pub(crate) fn message(&self) -> String {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some(requests) = &self.requests {
            return requests(n);
        }
        let user = match self.form {
            Form::New => format!("new-{n}"),
            Form::Known | Form::Keyed | Form::Stream => format!("{}-{}", self.name, n % self.users),
        };
        let more = match self.form {
            Form::Known | Form::New => String::new(),
            Form::Keyed => format!("idempotency-key: key-{n}\r\n"),
            Form::Stream => "accept: text/event-stream\r\n".to_owned(),
        };
        let body = format!("{{\"content\":\"{}\"}}", self.content);
        post(
            &format!("/v1/users/{user}/messages"),
            &format!("{}{more}", self.head),
            &body,
        )
    }
}

/// Sends each message's due time once it is due. This blocks its own thread, since a runtime's
/// timers are up to a millisecond late.
fn tick(send: &UnboundedSender<Instant>, begun: Instant, rate: f64, time: Duration) {
    for n in 0_u32.. {
        let due = Duration::from_secs_f64(f64::from(n) / rate);
        if due >= time {
            return;
        }
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
        send.send(begun + due).unwrap();
    }
}
