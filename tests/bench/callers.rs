//! Callers, as light as they can be: the machine is to be busy with what is measured.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Barrier, Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::figures::{Durations, count};

/// Connections at the most.
const CONNECTIONS: usize = 512;

/// What came of many messages.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// How long those took that were answered with a reply.
    pub(crate) taken: Durations,
    /// The same for those that were refused: 413, 429, 401, 503.
    pub(crate) refused: Durations,
    /// The same for those that failed: 502, 504.
    pub(crate) failed: Durations,
    /// From the first to the last.
    pub(crate) time: Duration,
    /// What was answered otherwise, or not at all.
    pub(crate) odd: usize,
}

/// Users, whose messages go over connections that are kept.
#[derive(Clone)]
pub(crate) struct Callers {
    address: SocketAddr,
    users: usize,
    next: Arc<AtomicUsize>,
    /// Further lines of the head.
    head: String,
    content: String,
    /// Before another message after one that was not answered with a reply.
    pause: Duration,
}

/// A message's status, if it was answered, and how long that took.
type Asked = (Option<u16>, Duration);

impl Answers {
    fn of(asked: impl Iterator<Item = Asked>, time: Duration) -> Self {
        let (mut taken, mut refused, mut failed, mut odd) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (status, took) in asked {
            match status {
                Some(200) => taken.push(took),
                Some(401 | 413 | 429 | 503) => refused.push(took),
                Some(502 | 504) => failed.push(took),
                _ => odd += 1,
            }
        }
        let in_order = |durations: Vec<Duration>| durations.into_iter().collect();
        Self { taken: in_order(taken), refused: in_order(refused), failed: in_order(failed), time, odd }
    }

    /// Turns a second.
    pub(crate) fn rate(&self) -> f64 {
        count(self.taken.len()) / self.time.as_secs_f64()
    }
}

impl Callers {
    pub(crate) fn new(address: SocketAddr, users: usize) -> Self {
        let content = "hello".to_owned();
        Self { address, users, next: Arc::default(), head: String::new(), content, pause: Duration::ZERO }
    }

    pub(crate) fn with_head(self, head: &str) -> Self {
        Self { head: head.to_owned(), ..self }
    }

    pub(crate) fn who_say(self, content: String) -> Self {
        Self { content, ..self }
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
                let mut connection = Connection::open(callers.address).await;
                for _ in 0..share {
                    assert_eq!(connection.ask(&callers.message()).await, Some(200), "a first message");
                }
            });
        }
        tasks.join_all().await;
    }

    /// One message.
    pub(crate) async fn ask(&self) -> Option<u16> {
        Connection::open(self.address).await.ask(&self.message()).await
    }

    /// So many callers, each of whom asks again once the answer is there.
    pub(crate) async fn keep_asking(&self, callers: usize, time: Duration) -> Answers {
        let (begun, mut tasks) = (Instant::now(), JoinSet::new());
        for _ in 0..callers {
            let this = self.clone();
            tasks.spawn(async move {
                let (mut connection, mut asked) = (Connection::open(this.address).await, Vec::new());
                while begun.elapsed() < time {
                    let (status, took) = connection.timed(&this.message(), Instant::now()).await;
                    asked.push((status, took));
                    if status != Some(200) && !this.pause.is_zero() {
                        sleep(this.pause).await;
                    }
                }
                asked
            });
        }
        let asked = tasks.join_all().await.into_iter().flatten();
        Answers::of(asked, begun.elapsed())
    }

    /// So many messages a second, whatever becomes of those before: what comes while all connections are busy waits, and
    /// that counts. What came before the time `after` does not.
    pub(crate) async fn arrive(&self, rate: f64, after: Duration, time: Duration) -> Answers {
        let (send, arrivals) = mpsc::unbounded_channel::<(Instant, bool)>();
        let arrivals = Arc::new(Mutex::new(arrivals));
        let ready = Arc::new(Barrier::new(CONNECTIONS + 1));
        let mut tasks = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (this, arrivals, ready) = (self.clone(), Arc::clone(&arrivals), Arc::clone(&ready));
            tasks.spawn(async move {
                let (mut connection, mut asked) = (Connection::open(this.address).await, Vec::new());
                ready.wait().await;
                loop {
                    let Some((at, counts)) = arrivals.lock().await.recv().await else { return asked };
                    let one = connection.timed(&this.message(), at).await;
                    asked.extend(counts.then_some(one));
                }
            });
        }
        ready.wait().await;
        let begun = Instant::now();
        let mut made = 0_u32;
        while begun.elapsed() < after + time {
            sleep_until(begun + Duration::from_secs_f64(f64::from(made + 1) / rate)).await;
            let now = Instant::now();
            while f64::from(made) < begun.elapsed().as_secs_f64() * rate {
                send.send((now, begun.elapsed() >= after)).unwrap();
                made += 1;
            }
        }
        drop(send);
        Answers::of(tasks.join_all().await.into_iter().flatten(), time)
    }

    /// The next user's message.
    fn message(&self) -> String {
        let user = self.next.fetch_add(1, Ordering::Relaxed) % self.users;
        let body = format!("{{\"content\":\"{}\"}}", self.content);
        format!(
            "POST /v1/users/user-{user}/messages HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n\
             {}content-length: {}\r\n\r\n{body}",
            self.head,
            body.len()
        )
    }
}

/// A connection to the gateway, which it keeps open.
pub(crate) struct Connection {
    address: SocketAddr,
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { address, stream, buffer: Vec::with_capacity(4096) }
    }

    async fn timed(&mut self, message: &str, since: Instant) -> Asked {
        let status = self.ask(message).await;
        let took = since.elapsed();
        if status.is_none() {
            *self = Self::open(self.address).await;
        }
        (status, took)
    }

    /// The body of the last answer.
    pub(crate) fn body(&self) -> &[u8] {
        let end = self.buffer.windows(4).position(|window| window == b"\r\n\r\n");
        &self.buffer[end.unwrap() + 4..]
    }

    /// The status, once the whole answer is there; `None` if the connection broke.
    pub(crate) async fn ask(&mut self, message: &str) -> Option<u16> {
        self.stream.write_all(message.as_bytes()).await.ok()?;
        self.buffer.clear();
        loop {
            if let Some((status, whole)) = answer_in(&self.buffer)
                && self.buffer.len() >= whole
            {
                return Some(status);
            }
            if self.stream.read_buf(&mut self.buffer).await.ok()? == 0 {
                return None;
            }
        }
    }
}

/// The status and the length of an answer whose head is there; it has a length, for it is no stream.
fn answer_in(bytes: &[u8]) -> Option<(u16, usize)> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length: usize = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())?;
    Some((status, end + 4 + length))
}
