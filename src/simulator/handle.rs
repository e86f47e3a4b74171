//! Access to the simulator from inside the process, for tests and benches.

use std::sync::Arc;

use super::{assistants, responses, text_search};
use crate::simulator::state::Server;
use crate::simulator::state::faults::Fault;
use crate::simulator::state::stats::{Line, Recorded, RunView, Stats, ThreadView};

/// Inspects and steers a simulator. Cheap to clone. May outlive the simulator.
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

    /// Waits until the statistics satisfy `reached`, and returns them. It checks now and after
    /// every change. It may be dropped; put a time limit around it.
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

    /// Returns all threads and conversations, oldest first, threads before conversations.
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

    /// Returns the newest accepted runs and responses, in order of acceptance, with their input
    /// and how they ended. [`max_kept`](super::config::SimulatorConfig::max_kept) limits their
    /// number.
    pub fn runs(&self) -> Vec<RunView> {
        self.server.world().counters.runs()
    }

    /// Returns the messages of a thread, of a conversation, or of the chain that ends in a
    /// response: role and text, oldest first. Empty if there is no such object.
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

    /// Returns the ids of all stored responses, oldest first.
    pub fn stored_responses(&self) -> Vec<String> {
        self.server
            .world()
            .responses
            .iter()
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Returns the ids of items that outlived their deleted conversations.
    pub fn leaked_items(&self) -> Vec<String> {
        text_search::leaked_items(&self.server.world())
    }

    /// Returns the places where the server still holds this text, such as `item msg_1 of
    /// conversation conv_1`. Empty if no call can return the text. The record of requests does
    /// not count.
    pub fn holds_text(&self, text: &str) -> Vec<String> {
        text_search::places(&self.server.world(), text)
    }

    /// Returns the last requests of either protocol, oldest first.
    pub fn recorded(&self) -> Vec<Recorded> {
        self.server
            .world()
            .counters
            .recorded
            .iter()
            .cloned()
            .collect()
    }

    /// Queues a fault for the next matching requests. An error says what is wrong with the fault.
    pub fn add_fault(&self, fault: Fault) -> Result<(), String> {
        self.server.world().faults.add(fault)
    }

    /// Removes the queued faults.
    pub fn clear_faults(&self) {
        self.server.world().faults.clear();
    }

    /// Keeps runs `in_progress` without a token from now on, until [`release`](Self::release).
    pub fn hold(&self) {
        self.server.hold();
    }

    /// Lets held runs continue.
    pub fn release(&self) {
        self.server.release();
    }

    /// Removes all threads, runs and faults, resets the statistics, and releases held runs.
    pub fn reset(&self) {
        self.server.reset();
    }

    /// Locks a thread or conversation with the run of another client. Returns the run's id, or
    /// `None` if there is no such thread or it is busy.
    pub fn start_foreign_run(&self, thread: &str) -> Option<String> {
        let started = assistants::start_foreign_run(&self.server, thread)
            .or_else(|| responses::start_foreign_run(&self.server, thread));
        self.server.changed();
        started
    }

    /// Ends the run of [`start_foreign_run`](Self::start_foreign_run). Returns false if there is
    /// none.
    pub fn stop_foreign_run(&self, thread: &str) -> bool {
        let stopped = assistants::stop_foreign_run(&self.server, thread)
            || responses::stop_foreign_run(&self.server, thread);
        self.server.changed();
        stopped
    }
}
