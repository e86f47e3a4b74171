//! What threads hold.

use crate::simulator::holding::Search;
use crate::simulator::state::World;

pub(in crate::simulator) fn search(world: &World, search: &mut Search<'_>) {
    for (id, thread) in world.threads.iter() {
        search.look(|| format!("thread {id}"), thread);
        for message in &thread.messages {
            search.look(|| format!("message {} of thread {id}", message.id), message);
        }
    }
    for (id, run) in world.runs.iter() {
        search.look(|| format!("run {id}"), run);
        for step in &run.work.steps {
            search.look(|| format!("step {} of run {id}", step.id), step);
        }
    }
}
