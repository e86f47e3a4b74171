//! What all parts of the chaos test share, and its findings.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::RwLock;
use tokio_util::sync::CancellationToken;

use super::fleet::Fleet;
use crate::support::cluster::Cluster;
use crate::support::scene::Scene;

pub(super) struct World {
    pub(super) seed: u64,
    pub(super) fleet: Fleet,
    pub(super) scene: Scene,
    /// The server of the scene's database. A fault holds the write lock while the server is down.
    pub(super) server: Arc<RwLock<Cluster>>,
    /// Cancelled once no user may begin another message.
    pub(super) over: CancellationToken,
    begun: Instant,
    notes: Mutex<Notes>,
    troubles: Arc<Troubles>,
}

/// Counts of the fault injector's faults.
#[derive(Default)]
struct Troubles {
    begun: AtomicUsize,
    ended: AtomicUsize,
}

/// A fault of the fault injector, while it lasts.
pub(super) struct Trouble(Arc<Troubles>);

impl Drop for Trouble {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct Notes {
    counts: BTreeMap<String, usize>,
    most: BTreeMap<&'static str, Duration>,
    /// What each user and the fault injector did.
    stories: BTreeMap<Teller, Vec<(Duration, String)>>,
    /// The findings, each with the user that it concerns, if it concerns one.
    faults: Vec<(Teller, String)>,
}

/// Whose story a line belongs to.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Teller {
    FaultInjector,
    User(usize),
    /// A finding that concerns no single user.
    Nobody,
}

/// Largest number of users whose stories the report tells at length.
const STORIES: usize = 8;

impl World {
    pub(super) fn new(seed: u64, fleet: Fleet, scene: Scene, server: Cluster) -> Self {
        Self {
            seed,
            fleet,
            scene,
            server: Arc::new(RwLock::new(server)),
            over: CancellationToken::new(),
            begun: Instant::now(),
            notes: Mutex::default(),
            troubles: Arc::default(),
        }
    }

    /// Notes that a fault begins. Dropping the value notes its end.
    pub(super) fn trouble(&self) -> Trouble {
        self.troubles.begun.fetch_add(1, Ordering::SeqCst);
        Trouble(Arc::clone(&self.troubles))
    }

    /// Returns the number of faults so far if exactly one is active.
    pub(super) fn only_trouble(&self) -> Option<usize> {
        let ended = self.troubles.ended.load(Ordering::SeqCst);
        let begun = self.troubles.begun.load(Ordering::SeqCst);
        (begun == ended + 1).then_some(begun)
    }

    pub(super) fn tell(&self, teller: Teller, what: impl Into<String>) {
        let at = self.begun.elapsed();
        self.notes
            .lock()
            .unwrap()
            .stories
            .entry(teller)
            .or_default()
            .push((at, what.into()));
    }

    /// Records a finding: something that must not be.
    pub(super) fn fault(&self, teller: Teller, what: impl Into<String>) {
        let what = what.into();
        self.tell(teller, format!("!! {what}"));
        self.notes.lock().unwrap().faults.push((teller, what));
    }

    pub(super) fn count(&self, what: &str) {
        self.add(what, 1);
    }

    pub(super) fn add(&self, what: &str, more: usize) {
        *self
            .notes
            .lock()
            .unwrap()
            .counts
            .entry(what.to_owned())
            .or_default() += more;
    }

    pub(super) fn counted(&self, what: &str) -> usize {
        self.notes
            .lock()
            .unwrap()
            .counts
            .get(what)
            .copied()
            .unwrap_or_default()
    }

    /// Keeps the longest time.
    pub(super) fn took(&self, what: &'static str, time: Duration) {
        let mut notes = self.notes.lock().unwrap();
        let most = notes.most.entry(what).or_default();
        *most = time.max(*most);
    }

    pub(super) fn has_faults(&self) -> bool {
        !self.notes.lock().unwrap().faults.is_empty()
    }

    /// Returns a few lines on what was done.
    pub(super) fn summary(&self) -> String {
        let notes = self.notes.lock().unwrap();
        let mut text = format!(
            "chaos for {:.0} s, THREADKEEPER_TEST_SEED={}",
            self.begun.elapsed().as_secs_f64(),
            self.seed
        );
        let mut group = "";
        for (what, count) in &notes.counts {
            let (of, what) = what.split_once(": ").unwrap_or(("", what));
            if of != group {
                let _ = write!(text, "\n  {of}:");
                group = of;
            }
            let _ = write!(text, " {what} {count},");
        }
        text.push_str("\n  longest:");
        for (what, time) in &notes.most {
            let _ = write!(text, " {what} {:.2} s,", time.as_secs_f64());
        }
        text
    }

    /// Returns the findings, with the stories of their users and the replicas' log lines about
    /// their runs.
    pub(super) async fn report(&self) -> String {
        let logs = self.fleet.logs().await;
        let folder = std::env::temp_dir().join(format!("threadkeeper-chaos-{}", self.seed));
        let kept = std::fs::create_dir_all(&folder).and_then(|()| {
            logs.iter().try_for_each(|(process, lines)| {
                std::fs::write(folder.join(format!("{process}.log")), lines.join("\n"))
            })
        });
        let notes = self.notes.lock().unwrap();
        let mut text = format!("\n{} faults:\n", notes.faults.len());
        for (teller, what) in &notes.faults {
            let _ = writeln!(text, "  {teller:?}: {what}");
        }
        let mut concerned = vec![];
        for (teller, _) in &notes.faults {
            if !concerned.contains(teller) && concerned.len() < STORIES {
                concerned.push(*teller);
            }
        }
        for teller in concerned.into_iter().chain([Teller::FaultInjector]) {
            let _ = writeln!(text, "\nThe story of {teller:?}:");
            for (at, what) in notes.stories.get(&teller).into_iter().flatten() {
                let _ = writeln!(text, "  {:8.3} {what}", at.as_secs_f64());
            }
        }
        match kept {
            Ok(()) => drop(write!(
                text,
                "\nWhat the replicas logged is in {}.",
                folder.display()
            )),
            Err(error) => drop(write!(
                text,
                "\nWhat the replicas logged could not be kept: {error}."
            )),
        }
        text
    }
}
