//! The simulator from inside the process: what tests and benches hold on to.

use std::sync::Arc;

use super::{assistants, responses, text_search};
use crate::simulator::state::Server;
use crate::simulator::state::faults::Fault;
use crate::simulator::state::stats::{Line, Recorded, RunView, Stats, ThreadView};

/// Looks into a simulator and steers it. Cheap to clone; outlives the simulator harmlessly.
#[derive(Clone, Debug)]
pub struct SimulatorHandle {
    server: Arc<Server>,
}

impl SimulatorHandle {
    pub(super) fn new(server: Arc<Server>) -> Self {
        Self { server }
    }

    pub fn stats(&self) -> Stats {
        self.server.world().counters.stats.clone()
    }

    /// Resolves with the first statistics for which `reached` is true, checked now and after every change. May be
    /// dropped; put a time limit around it.
    pub async fn wait_for(&self, mut reached: impl FnMut(&Stats) -> bool) -> Stats {
        let mut changes = self.server.changes();
        loop {
            changes.borrow_and_update();
            let stats = self.stats();
            if reached(&stats) || changes.changed().await.is_err() {
                return stats;
            }
        }
    }

    /// All threads and conversations, oldest first, threads before conversations.
    pub fn threads(&self) -> Vec<ThreadView> {
        let world = self.server.world();
        let threads = world.threads.iter().map(|(_, thread)| thread.view());
        threads
            .chain(
                world
                    .conversations
                    .iter()
                    .map(|(_, conversation)| conversation.view()),
            )
            .collect()
    }

    /// The newest runs and responses that were accepted, in that order, as many as are
    /// [kept](super::config::SimulatorConfig::max_kept), with what came with them and how they ended.
    pub fn runs(&self) -> Vec<RunView> {
        self.server.world().counters.runs()
    }

    /// The messages of a thread, of a conversation, or of the chain that ends in a response: role and text,
    /// oldest first. Empty if there is no such thing.
    pub fn thread_history(&self, id: &str) -> Vec<Line> {
        let world = self.server.world();
        if let Some(thread) = world.threads.get(id) {
            thread.lines()
        } else if let Some(conversation) = world.conversations.get(id) {
            conversation.lines()
        } else {
            responses::chain_lines(&world, id)
        }
    }

    /// The ids of all stored responses, oldest first.
    pub fn stored_responses(&self) -> Vec<String> {
        self.server
            .world()
            .responses
            .iter()
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// The ids of the items of deleted conversations, which were not deleted with them.
    pub fn leaked_items(&self) -> Vec<String> {
        text_search::leaked_items(&self.server.world())
    }

    /// Where the server still holds this text, such as `item msg_1 of conversation conv_1`. Empty if it is nowhere in
    /// what can be had from it. What was recorded of requests does not count.
    pub fn holds_text(&self, text: &str) -> Vec<String> {
        text_search::places(&self.server.world(), text)
    }

    /// The last requests of either protocol, oldest first.
    pub fn recorded(&self) -> Vec<Recorded> {
        self.server
            .world()
            .counters
            .recorded
            .iter()
            .cloned()
            .collect()
    }

    /// Queues a fault for the next matching requests; an error says what is wrong with it.
    pub fn add_fault(&self, fault: Fault) -> Result<(), String> {
        self.server.world().faults.add(fault)
    }

    /// Forgets the faults that wait.
    pub fn clear_faults(&self) {
        self.server.world().faults.clear();
    }

    /// From now on runs stay `in_progress` without a token, until [`release`](Self::release).
    pub fn hold(&self) {
        self.server.hold();
    }

    /// Lets held runs go on.
    pub fn release(&self) {
        self.server.release();
    }

    /// Forgets all threads, runs, faults and figures, and releases what is held.
    pub fn reset(&self) {
        self.server.reset();
    }

    /// Locks a thread or conversation as somebody else's run would. The run's id; `None` if there is no such
    /// thread or it is busy.
    pub fn start_foreign_run(&self, thread: &str) -> Option<String> {
        let started = assistants::start_foreign_run(&self.server, thread)
            .or_else(|| responses::start_foreign_run(&self.server, thread));
        self.server.changed();
        started
    }

    /// Ends what [`start_foreign_run`](Self::start_foreign_run) started. False if there was nothing to end.
    pub fn stop_foreign_run(&self, thread: &str) -> bool {
        let stopped = assistants::stop_foreign_run(&self.server, thread)
            || responses::stop_foreign_run(&self.server, thread);
        self.server.changed();
        stopped
    }
}
