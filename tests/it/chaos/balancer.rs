//! A load balancer. It deals connections in rotation to the replicas whose `/readyz` answers 200.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const CHECK_EVERY: Duration = Duration::from_millis(100);
const CHECK_TIMEOUT: Duration = Duration::from_millis(500);
/// Longest time that a connection waits while no replica is ready.
const QUEUE: Duration = Duration::from_secs(2);

/// A running balancer. Dropping it breaks all connections.
pub(super) struct Balancer {
    pub(super) url: String,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    places: Vec<Place>,
    turn: AtomicUsize,
}

/// The address of a replica, while one runs there.
struct Place {
    address: Mutex<Option<SocketAddr>>,
    ready: Mutex<bool>,
    valve: Valve,
}

impl Balancer {
    pub(super) async fn new(places: usize) -> Self {
        let place = || Place {
            address: Mutex::default(),
            ready: Mutex::default(),
            valve: Valve::new(),
        };
        let places = std::iter::repeat_with(place)
            .take(places)
            .collect::<Vec<_>>();
        let shared = Arc::new(Shared {
            places,
            turn: AtomicUsize::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut tasks = JoinSet::new();
        for place in 0..shared.places.len() {
            tasks.spawn(check(Arc::clone(&shared), place));
        }
        tasks.spawn(accept(listener, Arc::clone(&shared)));
        Self {
            url,
            shared,
            _tasks: tasks,
        }
    }

    /// Sets the address of a replica; `None` if its process has ended.
    pub(super) fn set(&self, place: usize, address: Option<SocketAddr>) {
        *self.shared.places[place].ready.lock().unwrap() = false;
        *self.shared.places[place].address.lock().unwrap() = address;
    }

    /// The valve of the connections between clients and this replica.
    pub(super) fn valve(&self, place: usize) -> &Valve {
        &self.shared.places[place].valve
    }

    /// Returns the number of ready replicas.
    pub(super) fn ready(&self) -> usize {
        self.shared
            .places
            .iter()
            .filter(|place| *place.ready.lock().unwrap())
            .count()
    }
}

impl Shared {
    /// Returns the ready replicas, beginning with the next one in rotation.
    fn candidates(&self) -> Vec<&Place> {
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        let places = (0..self.places.len()).map(|n| &self.places[(first + n) % self.places.len()]);
        places
            .filter(|place| *place.ready.lock().unwrap())
            .collect()
    }
}

async fn check(shared: Arc<Shared>, place: usize) {
    let client = reqwest::Client::builder()
        .no_proxy()
        .pool_max_idle_per_host(0)
        .timeout(CHECK_TIMEOUT);
    let client = client.build().unwrap();
    let place = &shared.places[place];
    loop {
        let address = *place.address.lock().unwrap();
        let ready = match address {
            None => false,
            Some(address) => {
                let answer = client.get(format!("http://{address}/readyz")).send().await;
                answer.is_ok_and(|answer| answer.status() == 200)
            }
        };
        // Another process may have this place by now.
        if *place.address.lock().unwrap() == address {
            *place.ready.lock().unwrap() = ready;
        }
        sleep(CHECK_EVERY).await;
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let client = next_client(&listener, &mut connections).await;
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            // If no replica is ready in time, the client's connection is closed.
            if let Ok((place, server)) = timeout(QUEUE, connect(&shared)).await {
                place.valve.join(client, server).await;
            }
        });
    }
}

/// Connects to a replica. Nothing has been sent yet, so a failed connection can be replaced by
/// another replica's.
async fn connect(shared: &Shared) -> (&Place, TcpStream) {
    loop {
        for place in shared.candidates() {
            let Some(address) = *place.address.lock().unwrap() else {
                continue;
            };
            if place.valve.weather().refuses {
                continue;
            }
            if let Ok(server) = TcpStream::connect(address).await {
                let _ = server.set_nodelay(true);
                return (place, server);
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
}
use crate::support::link::{Valve, next_client};
