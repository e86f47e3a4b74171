//! Ids and keys of earlier answers, so that requests get beyond the first checks.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;

use rand::Rng;
use rand::seq::{IndexedRandom, IteratorRandom};
use serde_json::Value;

/// Most ids of each kind. The newest ones are kept, since older ones are gone or done.
const KEPT: usize = 40;

#[derive(Default)]
pub(super) struct Pool {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// Ids by prefix.
    ids: HashMap<&'static str, VecDeque<String>>,
    /// The path of a conversation, and a run of it.
    runs: VecDeque<(String, String)>,
    /// The same for runs that wait for tool outputs, with the ids of the calls.
    asked: VecDeque<(String, String, Vec<String>)>,
}

pub(super) const PREFIXES: [&str; 4] = ["run_", "thr_", "msg_", "del_"];

impl Pool {
    /// Remembers the ids of an answer.
    pub(super) fn learn(&self, path: &str, body: &str) {
        let mut known = self.known.lock().unwrap();
        let scope = scope_of(path);
        for prefix in PREFIXES {
            for (at, _) in body.match_indices(prefix).take(KEPT) {
                let Some(id) = body.get(at..at + prefix.len() + 32) else {
                    continue;
                };
                if !id[prefix.len()..]
                    .bytes()
                    .all(|byte| byte.is_ascii_hexdigit())
                {
                    continue;
                }
                keep(known.ids.entry(prefix).or_default(), id.to_owned());
                if let Some(scope) = scope.filter(|_| prefix == "run_") {
                    keep(&mut known.runs, (scope.to_owned(), id.to_owned()));
                }
            }
        }
        let Some(scope) = scope else { return };
        let answer: Value = serde_json::from_str(body).unwrap_or_default();
        let run = &answer["run"];
        if let (Some(id), Some(calls)) = (
            run["id"].as_str(),
            run["required_action"]["tool_calls"].as_array(),
        ) {
            let calls = calls
                .iter()
                .map(|call| call["id"].as_str().unwrap().to_owned())
                .collect();
            keep(&mut known.asked, (scope.to_owned(), id.to_owned(), calls));
        }
    }

    pub(super) fn id(&self, prefix: &str, rng: &mut impl Rng) -> Option<String> {
        let known = self.known.lock().unwrap();
        known.ids.get(prefix)?.iter().choose(rng).cloned()
    }

    /// Returns a conversation whose path has this number of segments, and a run of it.
    pub(super) fn run(&self, segments: usize, rng: &mut impl Rng) -> Option<(String, String)> {
        let known = self.known.lock().unwrap();
        known
            .runs
            .iter()
            .filter(|(scope, _)| scope.split('/').count() == segments)
            .choose(rng)
            .cloned()
    }

    pub(super) fn asked(
        &self,
        segments: usize,
        rng: &mut impl Rng,
    ) -> Option<(String, String, Vec<String>)> {
        let known = self.known.lock().unwrap();
        let fits = known
            .asked
            .iter()
            .filter(|(scope, _, _)| scope.split('/').count() == segments);
        // The newest run is the most likely to wait still.
        let newest = fits.rev().take(3).collect::<Vec<_>>();
        newest.choose(rng).map(|it| (*it).clone())
    }
}

fn keep<T: PartialEq>(queue: &mut VecDeque<T>, it: T) {
    if queue.contains(&it) {
        return;
    }
    queue.push_back(it);
    if queue.len() > KEPT {
        queue.pop_front();
    }
}

/// Returns the conversation in a path.
fn scope_of(path: &str) -> Option<&str> {
    let path = path.strip_prefix("/v1/users/").map(|_| path)?;
    ["/messages", "/thread/", "/thread", "/runs"]
        .iter()
        .filter_map(|rest| path.rfind(rest))
        .min()
        .map(|at| &path[..at])
}
