//! Callers, as light as they can be: the machine is to be busy with what is measured.

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

/// Connections of an open loop.
const CONNECTIONS: usize = 1024;

/// What callers ask for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(crate) enum Form {
    /// An answer in JSON, in a conversation that is there.
    #[default]
    Known,
    /// The first one of a new conversation.
    New,
    /// The same as `known`, with an `Idempotency-Key`.
    Keyed,
    /// The same as `known`, as a stream of events.
    Stream,
}

/// Gives the request with this number.
type Requests = Arc<dyn Fn(usize) -> String + Send + Sync>;

/// Users, whose messages go over connections that are kept.
#[derive(Clone)]
pub(crate) struct Callers {
    address: SocketAddr,
    /// Their keys begin so.
    name: &'static str,
    users: usize,
    next: Arc<AtomicUsize>,
    /// Further lines of the head.
    head: String,
    content: String,
    form: Form,
    /// Replaces the messages to the gateway.
    requests: Option<Requests>,
    /// Before another message after one that was not answered with a reply.
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

    /// To the same gateway by way of a proxy.
    pub(crate) fn who_go_by(&self, proxy: SocketAddr) -> Self {
        Self {
            address: proxy,
            ..self.clone()
        }
    }

    /// Requests of another kind than messages to the gateway.
    pub(crate) fn who_send(self, requests: Requests) -> Self {
        Self {
            requests: Some(requests),
            ..self
        }
    }

    pub(crate) fn who_pause(self, pause: Duration) -> Self {
        Self { pause, ..self }
    }

    /// One message of each user.
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
                        "a first message"
                    );
                }
            });
        }
        tasks.join_all().await;
    }

    pub(crate) async fn connect(&self) -> Connection {
        Connection::open(self.address).await
    }

    /// One message.
    pub(crate) async fn ask(&self) -> Option<u16> {
        self.connect().await.ask(&self.message()).await
    }

    /// So many callers, each of whom asks again once the answer is there.
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

    /// An open loop at `rate` messages a second. A message that is due while all connections are busy waits, and its
    /// latency counts from when it was due. Messages of the time `onset` do not count.
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

    /// The next user's message.
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

/// Sends the due time of each message, once it is due. It blocks a thread of its own: a runtime's timers are up to
/// a millisecond late.
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
