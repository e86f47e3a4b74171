//! Three replicas of the real binary. Each has its own clock and its own links to database and
//! upstream.

use std::fmt::Write as _;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use super::balancer::Balancer;
use crate::support::clock;
use crate::support::gateway::Gateway;
use crate::support::link::Link;

/// Time after which a silent replica counts as dead.
pub(super) const SESSION: Duration = Duration::from_secs(2);
pub(super) const GRACE: Duration = Duration::from_secs(2);
/// Longest time that the end of a process may take beyond its grace.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(10);

/// The names of the replicas, and the error of their clocks in seconds.
const REPLICAS: [(&str, i64); 3] = [("right", 0), ("ahead", 3600), ("behind", -3600)];

/// The assistants, each at an upstream of another kind: name, settings of the upstream, settings
/// of the assistant.
pub(super) const ASSISTANTS: [(&str, &str, &str); 3] = [
    (
        "threads",
        "kind = \"assistants\"",
        "assistant_id = \"asst_test\"",
    ),
    (
        "conversations",
        "kind = \"responses\"",
        "model = \"test-model\"",
    ),
    (
        "background",
        "kind = \"responses\"\nbackground = true",
        "model = \"test-model\"",
    ),
];

pub(super) struct Fleet {
    pub(super) balancer: Balancer,
    replicas: Vec<Arc<AsyncMutex<Replica>>>,
    /// The logs of processes that have ended, by process.
    logs: Mutex<Vec<(String, Vec<String>)>>,
}

/// A replica, which is one process after the other.
pub(super) struct Replica {
    pub(super) place: usize,
    pub(super) name: &'static str,
    clock: i64,
    pub(super) database: Link,
    pub(super) upstream: Link,
    gateway: Option<Gateway>,
    processes: usize,
}

/// How a process ended after it was asked to.
pub(super) struct Stopped {
    pub(super) status: ExitStatus,
    pub(super) took: Duration,
    /// The log, which has a line about the work that was left.
    pub(super) log: Vec<String>,
}

impl Fleet {
    /// Starts all replicas.
    pub(super) async fn start(database: &str, upstream: &str) -> Self {
        let mut replicas = Vec::new();
        for (place, (name, clock)) in REPLICAS.into_iter().enumerate() {
            let (database, upstream) =
                tokio::join!(Link::to_postgres(database), Link::to_upstream(upstream));
            let replica = Replica {
                place,
                name,
                clock,
                database,
                upstream,
                gateway: None,
                processes: 0,
            };
            replicas.push(Arc::new(AsyncMutex::new(replica)));
        }
        let fleet = Self {
            balancer: Balancer::new(replicas.len()).await,
            replicas,
            logs: Mutex::default(),
        };
        for place in 0..fleet.len() {
            fleet.launch(&mut *fleet.lock(place).await).await;
        }
        fleet
    }

    pub(super) fn len(&self) -> usize {
        self.replicas.len()
    }

    /// Waits until no other task holds this replica's process, and takes it.
    pub(super) async fn lock(&self, place: usize) -> OwnedMutexGuard<Replica> {
        Arc::clone(&self.replicas[place]).lock_owned().await
    }

    /// Takes the replica, unless another task holds its process.
    pub(super) fn try_lock(&self, place: usize) -> Option<OwnedMutexGuard<Replica>> {
        Arc::clone(&self.replicas[place]).try_lock_owned().ok()
    }

    /// Starts a process and tells the balancer its address.
    pub(super) async fn launch(&self, replica: &mut Replica) {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("gateway.toml");
        std::fs::write(&file, config(&replica.database.url, &replica.upstream.url)).unwrap();
        let mut command = Gateway::command(&["serve", "--listen", "127.0.0.1:0", "--config"]);
        command.arg(&file);
        if replica.clock != 0 {
            clock::shift(&mut command, replica.clock);
        }
        let gateway = Gateway::spawn(command, folder).await;
        self.balancer
            .set(replica.place, Some(gateway.address().parse().unwrap()));
        replica.gateway = Some(gateway);
        replica.processes += 1;
    }

    /// Sends SIGKILL. The balancer must find out by itself.
    pub(super) fn kill(&self, replica: &mut Replica) {
        let gateway = replica.gateway.take().unwrap();
        self.keep_log(replica, gateway.logs());
        gateway.kill();
    }

    /// Sends SIGTERM and waits for the end.
    pub(super) async fn stop(&self, replica: &mut Replica) -> Stopped {
        let mut gateway = replica.gateway.take().unwrap();
        let begun = Instant::now();
        gateway.terminate();
        let status = gateway.exit().await;
        let took = begun.elapsed();
        self.balancer.set(replica.place, None);
        let log = gateway.logs();
        self.keep_log(replica, log.clone());
        Stopped { status, took, log }
    }

    fn keep_log(&self, replica: &Replica, log: Vec<String>) {
        self.logs.lock().unwrap().push((replica.process(), log));
    }

    /// Returns the logs of all processes, by process.
    pub(super) async fn logs(&self) -> Vec<(String, Vec<String>)> {
        let mut logs = self.logs.lock().unwrap().clone();
        for place in 0..self.len() {
            let replica = self.lock(place).await;
            logs.extend(
                replica
                    .gateway
                    .as_ref()
                    .map(|gateway| (replica.process(), gateway.logs())),
            );
        }
        logs
    }
}

impl Replica {
    /// The running process of this replica.
    pub(super) fn gateway(&self) -> &Gateway {
        self.gateway.as_ref().unwrap()
    }

    /// The process's name in reports.
    pub(super) fn process(&self) -> String {
        format!("{}-{}", self.name, self.processes)
    }

    /// Returns the number of the process's open files and sockets.
    pub(super) fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.gateway().id()))
            .unwrap()
            .count()
    }
}

fn config(database: &str, upstream: &str) -> String {
    let mut config = format!(
        "[server]\nshutdown_grace = \"{}ms\"\nstream_keep_alive = \"1s\"\n\
         [replica]\nsession_ttl = \"{}ms\"\n\
         [runs]\ntimeout = \"40s\"\nsettle_timeout = \"3s\"\n\
         [janitor]\ninterval = \"1s\"\ncalls_per_second = 1000\n\
         [store]\nurl = {database:?}\nacquire_timeout = \"2s\"\nmax_connections = 8\n",
        GRACE.as_millis(),
        SESSION.as_millis(),
    );
    for (name, kind, assistant) in ASSISTANTS {
        // The default assistant answers messages that name none. No message here names none.
        let assistant_name = if name == ASSISTANTS[0].0 {
            "default"
        } else {
            name
        };
        let _ = write!(
            config,
            "[upstreams.{name}]\n{kind}\nbase_url = {upstream:?}\napi_key = \"sk-planted-key\"\ncall_timeout = \"10s\"\n\
             lock_window = \"2s\"\nbreaker_min_requests = 0\n\
             [assistants.{assistant_name}]\nupstream = \"{name}\"\n{assistant}\n"
        );
    }
    config
}
