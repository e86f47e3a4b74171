//! The simulator's port and its connections.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::simulator::config::SimulatorConfig;
use crate::simulator::handle::SimulatorHandle;
use crate::simulator::router;
use crate::simulator::state::Server;

/// A simulator that is bound to its port. It serves once it [runs](Self::run).
#[derive(Debug)]
pub struct Simulator {
    server: Arc<Server>,
    listener: TcpListener,
    addr: SocketAddr,
}

impl Simulator {
    /// Binds the port; port 0 chooses a free one. From then on clients can connect, and wait.
    pub async fn bind(config: SimulatorConfig, addr: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        Ok(Self {
            server: Arc::new(Server::new(config)),
            listener,
            addr,
        })
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Returns the base URL of both protocols; it ends in `/v1`.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.addr)
    }

    pub fn handle(&self) -> SimulatorHandle {
        SimulatorHandle::new(Arc::clone(&self.server))
    }

    /// Serves until `shutdown`, then cuts all connections, ends all runs, and returns when they
    /// are gone. Dropping the future cuts and ends them too, without waiting.
    pub async fn run(self, shutdown: CancellationToken) {
        let server = &self.server;
        let _stop = server.stop.clone().drop_guard();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = shutdown.cancelled() => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    server.tasks.spawn(serve(Arc::clone(server), stream));
                }
                // Out of file descriptors, or a client that left early. Other clients may still
                // be served.
                Err(error) => {
                    tracing::warn!(%error, "the simulator cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
        drop(self.listener);
        self.server.stop.cancel();
        self.server.tasks.close();
        self.server.tasks.wait().await;
    }
}

/// Serves one connection until either side ends it.
async fn serve(server: Arc<Server>, stream: TcpStream) {
    if stream.set_nodelay(true).is_err() {
        return; // the client has left already
    }
    let stop = server.stop.clone();
    let service = service_fn(move |request| router::answer(Arc::clone(&server), request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_mins(5))
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        ended = connection => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection to the simulator broke");
            }
        }
        () = stop.cancelled() => {}
    }
}
