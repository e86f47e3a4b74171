//! A proxy in front of Postgres that counts the round trips of the frontend/backend protocol.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use url::Url;

/// A tapped way to a database.
pub(crate) struct Wiretap {
    pub(crate) url: String,
    trips: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

impl Wiretap {
    /// Opens another way to the database of this URL.
    pub(crate) async fn on(url: &str) -> Self {
        let target = Url::parse(url).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut tapped = target.clone();
        tapped.set_host(Some("127.0.0.1")).unwrap();
        tapped.set_port(Some(listener.local_addr().unwrap().port())).unwrap();
        tapped.set_query(Some("sslmode=disable"));
        let trips: Arc<AtomicUsize> = Arc::default();
        let counter = Arc::clone(&trips);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let (counter, target) = (Arc::clone(&counter), target.clone());
                connections.spawn(async move {
                    let socket = target
                        .query_pairs()
                        .find(|(name, _)| name == "host")
                        .map(|(_, folder)| folder.into_owned());
                    let port = target.port().unwrap_or(5432);
                    // Either side may leave at any time.
                    let _ = if let Some(folder) = socket {
                        let path = PathBuf::from(folder).join(format!(".s.PGSQL.{port}"));
                        relay(client, UnixStream::connect(path).await.unwrap(), &counter).await
                    } else {
                        let host = target.host_str().unwrap_or("localhost");
                        relay(client, TcpStream::connect((host, port)).await.unwrap(), &counter).await
                    };
                });
            }
        });
        Self { url: tapped.into(), trips, _task: task }
    }

    /// How often a client has asked and waited for an answer.
    pub(crate) fn round_trips(&self) -> usize {
        self.trips.load(Ordering::SeqCst)
    }
}

async fn relay(
    client: TcpStream,
    server: impl AsyncRead + AsyncWrite,
    trips: &AtomicUsize,
) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let questions = async {
        // The start-up message has no type.
        let length = from_client.read_i32().await?;
        let mut message = length.to_be_bytes().to_vec();
        message.resize(usize::try_from(length).unwrap(), 0);
        from_client.read_exact(&mut message[4..]).await?;
        to_server.write_all(&message).await?;
        let mut asked = false;
        loop {
            let kind = from_client.read_u8().await?;
            let length = from_client.read_i32().await?;
            let mut message = vec![kind];
            message.extend(length.to_be_bytes());
            message.resize(1 + usize::try_from(length).unwrap(), 0);
            from_client.read_exact(&mut message[5..]).await?;
            // Sync ends a group of extended messages, Query is a simple one: either is followed by a wait. A Sync
            // alone is a sign of life, which only a connection that was idle for long is asked for.
            if kind == b'Q' || (kind == b'S' && asked) {
                trips.fetch_add(1, Ordering::SeqCst);
            }
            asked = kind != b'S' && kind != b'Q';
            to_server.write_all(&message).await?;
            to_server.flush().await?;
        }
    };
    let answers = tokio::io::copy(&mut from_server, &mut to_client);
    tokio::select! {
        asked = questions => asked,
        answered = answers => answered.map(drop),
    }
}
