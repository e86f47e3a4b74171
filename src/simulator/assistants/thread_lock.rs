//! The lock of a thread by its run: the run's end, its expiry, and the refusal of other calls.

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::simulator::state::assistants::RunStatus;
use crate::simulator::state::{Server, World};
use crate::simulator::wire::error::ApiError;

/// Ends a run: sets its status, releases its thread's lock, and counts it. Safe to repeat.
pub(super) fn end_run(server: &Server, world: &mut World, id: &str, status: RunStatus) {
    let now = server.now();
    let Some(run) = world.runs.get_mut(id).filter(|run| !run.status.is_final()) else {
        return;
    };
    let thread = world.threads.get_mut(&run.thread_id);
    run.status = status;
    run.required_action = None;
    run.expires_at = None;
    match status {
        RunStatus::Completed => run.completed_at = Some(now),
        RunStatus::Incomplete => {
            run.completed_at = Some(now);
            run.incomplete_details = Some(json!({"reason": "max_completion_tokens"}));
        }
        RunStatus::Failed => {
            run.failed_at = Some(now);
            run.last_error = Some(server_error());
        }
        RunStatus::Cancelled => run.cancelled_at = Some(now),
        _ => {}
    }
    run.usage = Some(usage(
        run.work.tokens,
        thread.as_ref().map_or(0, |thread| thread.words),
    ));
    let generating = std::mem::take(&mut run.work.generating);
    if matches!(status, RunStatus::Expired | RunStatus::Cancelled) {
        // A step that waits for outputs ends with its run.
        for step in run
            .work
            .steps
            .iter_mut()
            .filter(|step| step.status == "in_progress")
        {
            let expired = status == RunStatus::Expired;
            step.status = if expired { "expired" } else { "cancelled" };
            *(if expired {
                &mut step.expired_at
            } else {
                &mut step.cancelled_at
            }) = Some(now);
        }
    }
    if let Some(thread) = thread {
        thread.active.retain(|active| active != id);
    }
    if !run.work.foreign {
        world
            .counters
            .end(&run.thread_id, id, generating, status.name());
    }
    server.changed();
}

/// Expires overdue runs of a thread that no generation works on.
pub(super) fn expire_stale(server: &Server, world: &mut World, thread: &str) {
    let Some(row) = world
        .threads
        .get(thread)
        .filter(|row| !row.active.is_empty())
    else {
        return;
    };
    let now = Instant::now();
    let overdue = |id: &&String| {
        world
            .runs
            .get(id)
            .is_some_and(|run| !run.work.generating && run.work.deadline <= now)
    };
    let overdue: Vec<String> = row.active.iter().filter(overdue).cloned().collect();
    for run in overdue {
        end_run(server, world, &run, RunStatus::Expired);
    }
}

/// Refuses with a conflict if a run is active; the text names the run.
pub(super) fn refuse_if_active(
    server: &Server,
    world: &mut World,
    thread: &str,
    text: impl FnOnce(&str) -> String,
) -> Result<(), ApiError> {
    if !server.config.enforce_locks {
        return Ok(());
    }
    let Some(run) = world
        .threads
        .get(thread)
        .and_then(|thread| thread.active.first())
    else {
        return Ok(());
    };
    let error = ApiError::invalid(text(run));
    world.counters.stats.lock_refusals += 1;
    server.changed();
    Err(error)
}

pub(super) fn server_error() -> Value {
    json!({"code": "server_error", "message": "Sorry, something went wrong."})
}

pub(super) fn usage(made: u64, all: u64) -> Value {
    let read = all.saturating_sub(made);
    json!({"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made})
}
