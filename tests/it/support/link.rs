//! Relays bytes between two sockets, and disturbs them on request.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use url::Url;

/// The disturbances of a link.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Weather {
    /// Delay of each piece, in either direction.
    pub(crate) delay: Duration,
    /// Close new connections at once.
    pub(crate) refuses: bool,
    /// Pass nothing on, but keep the connections open.
    pub(crate) swallows: bool,
    /// Pass requests on, but no answers.
    pub(crate) swallows_answers: bool,
}

/// Steers the connections of a link. Clones steer the same connections.
#[derive(Clone, Debug)]
pub(crate) struct Valve {
    weather: watch::Sender<Weather>,
    connections: Arc<Mutex<CancellationToken>>,
}

impl Valve {
    pub(crate) fn new() -> Self {
        Self {
            weather: watch::Sender::new(Weather::default()),
            connections: Arc::default(),
        }
    }

    pub(crate) fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    pub(crate) fn weather(&self) -> Weather {
        *self.weather.borrow()
    }

    /// Breaks all open connections.
    pub(crate) fn cut(&self) {
        std::mem::take(&mut *self.connections.lock().unwrap()).cancel();
    }

    /// Copies bytes between two sockets. Returns once both have ended, either one has failed, or
    /// the connection is cut.
    pub(crate) async fn join<C, S>(&self, client: C, server: S)
    where
        C: AsyncRead + AsyncWrite,
        S: AsyncRead + AsyncWrite,
    {
        let cut = self.connections.lock().unwrap().clone();
        let ((from_client, to_client), (from_server, to_server)) =
            (tokio::io::split(client), tokio::io::split(server));
        let carried = async {
            // Either side may close at any time.
            let _ = tokio::try_join!(
                self.carry(from_client, to_server, &cut, |weather| weather.swallows),
                self.carry(from_server, to_client, &cut, |weather| {
                    weather.swallows || weather.swallows_answers
                })
            );
        };
        tokio::select! {
            () = cut.cancelled() => {}
            () = carried => {}
        }
    }

    async fn carry(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
        cut: &CancellationToken,
        swallows: fn(&Weather) -> bool,
    ) -> std::io::Result<()> {
        let mut weather = self.weather.subscribe();
        let mut piece = vec![0; 16 * 1024];
        loop {
            let length = from.read(&mut piece).await?;
            let delay = {
                let gone = |_| std::io::Error::other("the way is gone");
                weather
                    .wait_for(|weather| !swallows(weather))
                    .await
                    .map_err(gone)?
                    .delay
            };
            // What was held back when the connection was cut never arrives, even if the weather is
            // good again by now.
            if cut.is_cancelled() {
                return Err(std::io::Error::other("the connection is cut"));
            }
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            if length == 0 {
                return to.shutdown().await;
            }
            to.write_all(&piece[..length]).await?;
        }
    }
}

/// The server behind a link.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Tcp(String),
    Unix(PathBuf),
}

/// A TCP or Unix connection.
pub(super) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Socket for S {}

impl Target {
    /// The server of the database with this URL.
    pub(super) fn of_postgres(url: &str) -> Self {
        let url = Url::parse(url).unwrap();
        let port = url.port().unwrap_or(5432);
        let socket = url
            .query_pairs()
            .find(|(name, _)| name == "host")
            .map(|(_, folder)| folder.into_owned());
        match socket {
            Some(folder) => Self::Unix(PathBuf::from(folder).join(format!(".s.PGSQL.{port}"))),
            None => Self::Tcp(format!("{}:{port}", url.host_str().unwrap_or("127.0.0.1"))),
        }
    }

    pub(super) async fn connect(&self) -> std::io::Result<Box<dyn Socket>> {
        Ok(match self {
            Self::Tcp(address) => {
                let server = TcpStream::connect(address).await?;
                let _ = server.set_nodelay(true);
                Box::new(server)
            }
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
        })
    }
}

/// A proxy between one replica and a server, which a test can disturb.
pub(crate) struct Link {
    /// URL of the server through this link.
    pub(crate) url: String,
    pub(crate) valve: Valve,
    _task: JoinSet<()>,
}

impl Link {
    /// Opens a link to the database with this URL.
    pub(crate) async fn to_postgres(url: &str) -> Self {
        let (target, place) = (Url::parse(url).unwrap(), Target::of_postgres(url));
        Self::open(target, place, Some("sslmode=disable")).await
    }

    /// Opens a link to the upstream with this URL.
    pub(crate) async fn to_upstream(url: &str) -> Self {
        let target = Url::parse(url).unwrap();
        let place = Target::Tcp(format!(
            "{}:{}",
            target.host_str().unwrap(),
            target.port().unwrap()
        ));
        Self::open(target, place, None).await
    }

    async fn open(mut url: Url, target: Target, query: Option<&str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        url.set_query(query);
        let valve = Valve::new();
        let mut task = JoinSet::new();
        task.spawn(accept(listener, target, valve.clone()));
        Self {
            url: url.into(),
            valve,
            _task: task,
        }
    }
}

async fn accept(listener: TcpListener, target: Target, valve: Valve) {
    let mut connections = JoinSet::new();
    loop {
        let client = next_client(&listener, &mut connections).await;
        if valve.weather().refuses {
            continue;
        }
        let (target, valve) = (target.clone(), valve.clone());
        connections.spawn(async move {
            if let Ok(server) = target.connect().await {
                valve.join(client, server).await;
            }
        });
    }
}

/// Accepts the next connection. Meanwhile it reaps the tasks of connections that have ended.
pub(crate) async fn next_client(
    listener: &TcpListener,
    connections: &mut JoinSet<()>,
) -> TcpStream {
    loop {
        tokio::select! {
            Some(ended) = connections.join_next() => ended.unwrap(),
            accepted = listener.accept() => {
                let (client, _) = accepted.unwrap();
                let _ = client.set_nodelay(true);
                return client;
            }
        }
    }
}
