//! A proxy that lends connections to Postgres for one transaction at a time. PgBouncer 1.21 and
//! newer does so with `pool_mode = transaction` and `max_prepared_statements`. Code that relies
//! on a session fails behind it.
//!
//! As with PgBouncer, named prepared statements follow a client to any connection. The unnamed
//! one does not.

use std::collections::hash_map::DefaultHasher;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::io;
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::{Mutex, OnceCell};
use tokio::task::JoinSet;
use url::Url;

use super::link::{Socket, Target, next_client};
use super::recording_proxy::next_message;

/// Number of connections to the server. Clients rotate over them, so with two a client changes
/// connection with each transaction.
const CONNECTIONS: usize = 2;

const PROTOCOL: i32 = 196_608;
const SSL_REQUEST: i32 = 80_877_103;

/// Startup parameters that PgBouncer knows, including user and database.
const KNOWN_PARAMETERS: [&str; 7] = [
    "user",
    "database",
    "application_name",
    "client_encoding",
    "DateStyle",
    "TimeZone",
    "standard_conforming_strings",
];

/// A pooler in front of a database.
pub(crate) struct Pooler {
    pub(crate) url: String,
    _task: JoinSet<()>,
}

impl Pooler {
    /// Opens a pooler in front of the database with this URL, whose server must not ask for a
    /// password.
    pub(crate) async fn on(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut pooled = Url::parse(url).unwrap();
        pooled.set_host(Some("127.0.0.1")).unwrap();
        pooled
            .set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        // The pooler refuses TLS, and the driver then continues without it.
        pooled.set_query(Some("sslmode=prefer"));
        let servers = Servers::of(url);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut clients = JoinSet::new();
            loop {
                let client = next_client(&listener, &mut clients).await;
                let servers = servers.clone();
                // Either side may close at any time.
                clients.spawn(async move { drop(serve(client, servers).await) });
            }
        });
        Self {
            url: pooled.into(),
            _task: task,
        }
    }
}

/// The connections to the server. Clones share the same connections.
#[derive(Clone)]
struct Servers {
    /// One entry for each idle connection; `None` is a connection that is not open yet. The
    /// client that has waited longest gets the next entry.
    free: Arc<Mutex<UnboundedReceiver<Option<Server>>>>,
    back: UnboundedSender<Option<Server>>,
    database: Arc<Database>,
    /// The server's greeting to the first connection. Each client gets the same one.
    greeting: Arc<OnceCell<Vec<u8>>>,
}

struct Database {
    target: Target,
    user: String,
    name: String,
}

impl Servers {
    fn of(url: &str) -> Self {
        let (back, free) = mpsc::unbounded_channel();
        for _ in 0..CONNECTIONS {
            back.send(None).unwrap();
        }
        let parsed = Url::parse(url).unwrap();
        let (user, name) = (
            parsed.username().to_owned(),
            parsed.path().trim_start_matches('/').to_owned(),
        );
        let database = Database {
            target: Target::of_postgres(url),
            user,
            name,
        };
        Self {
            free: Arc::new(Mutex::new(free)),
            back,
            database: Arc::new(database),
            greeting: Arc::default(),
        }
    }

    async fn lend(&self) -> io::Result<Loan> {
        let free = self
            .free
            .lock()
            .await
            .recv()
            .await
            .expect("this one holds a sender");
        let mut loan = Loan {
            server: free,
            back: self.back.clone(),
        };
        if loan.server.is_none() {
            loan.server = Some(Server::open(&self.database).await?);
        }
        Ok(loan)
    }

    async fn greeting(&self) -> io::Result<&[u8]> {
        let first = async || Ok(self.lend().await?.server().greeting.clone());
        self.greeting
            .get_or_try_init(first)
            .await
            .map(Vec::as_slice)
    }
}

/// A lent connection. Dropping the loan returns the connection, or closes it if it is not idle.
struct Loan {
    server: Option<Server>,
    back: UnboundedSender<Option<Server>>,
}

impl Loan {
    fn server(&mut self) -> &mut Server {
        self.server
            .as_mut()
            .expect("a connection is lent until the loan is dropped")
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        // The pooler is gone if the channel has no receiver.
        let _ = self
            .back
            .send(self.server.take().filter(|server| server.is_idle));
    }
}

async fn serve(client: TcpStream, servers: Servers) -> io::Result<()> {
    let (from, mut to) = client.into_split();
    let mut from = BufReader::new(from);
    let parameters = loop {
        match read_startup(&mut from).await? {
            (SSL_REQUEST, _) => to.write_all(b"N").await?,
            (PROTOCOL, parameters) => break parameters,
            // Another kind is a request to cancel a statement.
            _ => return Ok(()),
        }
    };
    if let Some(name) = parameters
        .iter()
        .find(|name| !KNOWN_PARAMETERS.contains(&name.as_str()))
    {
        let error = format!("SFATAL\0C08P01\0Munsupported startup parameter: {name}\0\0");
        return to.write_all(&message(b'E', &[error.as_bytes()])).await;
    }
    to.write_all(servers.greeting().await?).await?;
    let mut client = Client {
        to,
        statements: HashMap::new(),
    };
    // The connection that the client keeps while a transaction is open.
    let mut held = None;
    loop {
        let group = read_group(&mut from).await?;
        let answered = async {
            let mut loan = match held.take() {
                Some(loan) => loan,
                None => servers.lend().await?,
            };
            loan.server().answer(group, &mut client).await?;
            io::Result::Ok(loan)
        };
        let mut loan = tokio::select! {
            left = hang_up(&mut from) => return left,
            answered = answered => answered?,
        };
        held = (!loan.server().is_idle).then_some(loan);
    }
}

/// Reads the first message of a connection. Returns its code and the names of its parameters.
async fn read_startup(from: &mut BufReader<OwnedReadHalf>) -> io::Result<(i32, Vec<String>)> {
    let length = from.read_i32().await?;
    let code = from.read_i32().await?;
    let mut rest = vec![0; usize::try_from(length - 8).unwrap()];
    from.read_exact(&mut rest).await?;
    let texts: Vec<_> = rest.split(|byte| *byte == 0).collect();
    // The last chunk is the end of the list.
    let names = texts
        .chunks(2)
        .map(|two| String::from_utf8_lossy(two[0]).into_owned());
    Ok((code, names.filter(|name| !name.is_empty()).collect()))
}

/// Reads messages up to one after which the client waits for answers. Returns an error if the
/// client terminates.
async fn read_group(from: &mut BufReader<OwnedReadHalf>) -> io::Result<Vec<(u8, Vec<u8>)>> {
    let mut group = Vec::new();
    loop {
        let (kind, message) = next_message(from).await?;
        group.push((kind, message));
        match kind {
            b'S' | b'Q' => return Ok(group),
            b'X' => return Err(io::ErrorKind::ConnectionAborted.into()),
            _ => {}
        }
    }
}

/// Waits until the client closes its connection. Never returns if the client has sent more
/// before.
async fn hang_up(from: &mut BufReader<OwnedReadHalf>) -> io::Result<()> {
    if !from.fill_buf().await?.is_empty() {
        std::future::pending::<()>().await;
    }
    Ok(())
}

struct Client {
    to: OwnedWriteHalf,
    /// Prepared statements, by the client's own names.
    statements: HashMap<Vec<u8>, Prepared>,
}

#[derive(Clone)]
struct Prepared {
    /// The statement's name on every connection.
    name: Vec<u8>,
    /// Text and parameter types, as in the Parse message.
    body: Vec<u8>,
}

impl Prepared {
    fn new(body: &[u8]) -> Self {
        let mut hasher = DefaultHasher::new();
        body.hash(&mut hasher);
        Self {
            name: format!("pooler_{:016x}", hasher.finish()).into_bytes(),
            body: body.to_vec(),
        }
    }

    fn parse(&self) -> Vec<u8> {
        message(b'P', &[&self.name, b"\0", &self.body])
    }
}

/// An answer that the client is waiting for.
enum DueAnswer {
    /// An answer without a body, which the pooler makes itself.
    Made(u8),
    /// The server's answer that a connection has prepared a statement. The client sees it only if
    /// it has just asked for that.
    Parsed { name: Vec<u8>, is_shown: bool },
    /// The server's messages up to one of these kinds.
    Relayed(&'static [u8]),
}

/// A connection to the server.
struct Server {
    socket: BufReader<Box<dyn Socket>>,
    greeting: Vec<u8>,
    /// Names of the statements that this connection has prepared.
    prepared: HashSet<Vec<u8>>,
    /// The connection neither executes a statement nor has an open transaction.
    is_idle: bool,
}

impl Server {
    async fn open(database: &Database) -> io::Result<Self> {
        let mut socket = BufReader::new(database.target.connect().await?);
        let mut startup = Vec::new();
        startup.extend(PROTOCOL.to_be_bytes());
        for (name, value) in [
            ("user", database.user.as_str()),
            ("database", &database.name),
            ("application_name", "pooler"),
            ("client_encoding", "UTF8"),
            ("DateStyle", "ISO, MDY"),
            ("TimeZone", "UTC"),
        ] {
            startup.extend([name.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
        }
        startup.push(0);
        socket.write_all(&with_length(&[&startup])).await?;
        socket.flush().await?;
        let mut greeting = Vec::new();
        loop {
            let (kind, message) = next_message(&mut socket).await?;
            let is_welcome = match kind {
                b'R' => message[5..] == [0; 4],
                b'S' | b'K' | b'N' | b'Z' => true,
                _ => false,
            };
            assert!(
                is_welcome,
                "the server refused the pooler's connection: {}",
                String::from_utf8_lossy(&message)
            );
            greeting.extend(message);
            if kind == b'Z' {
                return Ok(Self {
                    socket,
                    greeting,
                    prepared: HashSet::new(),
                    is_idle: true,
                });
            }
        }
    }

    /// Sends a client's messages to the server, and the answers to the client.
    async fn answer(&mut self, group: Vec<(u8, Vec<u8>)>, client: &mut Client) -> io::Result<()> {
        self.is_idle = false;
        let (mut sent, mut due) = (Vec::new(), VecDeque::new());
        for (kind, message) in group {
            self.plan(kind, message, &mut client.statements, (&mut sent, &mut due))?;
        }
        self.socket.write_all(&sent).await?;
        self.socket.flush().await?;
        let mut answers = Vec::new();
        while let Some(next) = due.front_mut() {
            if let DueAnswer::Made(kind) = *next {
                answers.extend(message(kind, &[]));
                due.pop_front();
                continue;
            }
            let (kind, message) = next_message(&mut self.socket).await?;
            match (kind, next) {
                // After an error the server skips all messages up to its next ReadyForQuery.
                (b'E', _) => drop(due.drain(..due.len() - 1)),
                (b'1', DueAnswer::Parsed { name, is_shown }) => {
                    self.prepared.insert(std::mem::take(name));
                    let is_shown = *is_shown;
                    due.pop_front();
                    if !is_shown {
                        continue;
                    }
                }
                (_, DueAnswer::Relayed(ends)) if ends.contains(&kind) => drop(due.pop_front()),
                _ => {}
            }
            if kind == b'Z' {
                self.is_idle = message[5] == b'I';
            }
            answers.extend(message);
        }
        client.to.write_all(&answers).await
    }

    /// Returns what to send instead of a client's message, and adds the expected answers to
    /// `due`.
    fn plan(
        &self,
        kind: u8,
        asked: Vec<u8>,
        statements: &mut HashMap<Vec<u8>, Prepared>,
        (sent, due): (&mut Vec<u8>, &mut VecDeque<DueAnswer>),
    ) -> io::Result<()> {
        let lacks = |statement: &Prepared, due: &VecDeque<DueAnswer>| {
            let is_sent = |due: &DueAnswer| matches!(due, DueAnswer::Parsed { name, .. } if *name == statement.name);
            !self.prepared.contains(&statement.name) && !due.iter().any(is_sent)
        };
        match (kind, named(kind, &asked[5..])) {
            (b'P', Some(Named { name, rest, .. })) => {
                let statement = Prepared::new(rest);
                if lacks(&statement, due) {
                    sent.extend(statement.parse());
                    due.push_back(DueAnswer::Parsed {
                        name: statement.name.clone(),
                        is_shown: true,
                    });
                } else {
                    due.push_back(DueAnswer::Made(b'1'));
                }
                statements.insert(name.to_vec(), statement);
                return Ok(());
            }
            // The statement stays prepared, since other clients may use it on the connection.
            (b'C', Some(Named { name, .. })) => {
                statements.remove(name);
                due.push_back(DueAnswer::Made(b'3'));
                return Ok(());
            }
            (_, Some(Named { before, name, rest })) => {
                let unknown =
                    || io::Error::new(io::ErrorKind::InvalidData, "no such prepared statement");
                let statement = statements.get(name).ok_or_else(unknown)?;
                if lacks(statement, due) {
                    sent.extend(statement.parse());
                    due.push_back(DueAnswer::Parsed {
                        name: statement.name.clone(),
                        is_shown: false,
                    });
                }
                sent.extend(message(kind, &[before, &statement.name, b"\0", rest]));
            }
            (_, None) => sent.extend(asked),
        }
        due.push_back(DueAnswer::Relayed(match kind {
            b'P' => b"1",
            b'B' => b"2",
            b'D' => b"Tn",
            b'E' => b"CIs",
            b'C' => b"3",
            b'S' | b'Q' => b"Z",
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "no message that sqlx sends",
                ));
            }
        }));
        Ok(())
    }
}

/// The name of a prepared statement within a message, with the bytes before and after it.
struct Named<'a> {
    before: &'a [u8],
    name: &'a [u8],
    rest: &'a [u8],
}

/// Returns `None` if a message names no statement, or the unnamed one.
fn named(kind: u8, body: &[u8]) -> Option<Named<'_>> {
    let at = match (kind, body.first()) {
        (b'P', _) => 0,
        // The name of the portal comes first.
        (b'B', _) => body.iter().position(|byte| *byte == 0)? + 1,
        (b'D' | b'C', Some(b'S')) => 1,
        _ => return None,
    };
    let (before, from) = body.split_at(at);
    let end = from.iter().position(|byte| *byte == 0)?;
    (end > 0).then(|| Named {
        before,
        name: &from[..end],
        rest: &from[end + 1..],
    })
}

fn message(kind: u8, body: &[&[u8]]) -> Vec<u8> {
    [&[kind], with_length(body).as_slice()].concat()
}

fn with_length(body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let length = u32::try_from(body.len() + 4).unwrap();
    [&length.to_be_bytes(), body.as_slice()].concat()
}
