//! Decides how a run ends, as a pure function of its local end and of what the upstream has of it.

use super::failure::Failure;
use super::progress::{Delivery, Progress};
use crate::domain::{
    ContentPart, EventBatch, MessageId, ReplyText, Rerun, RunError, RunErrorCode, RunStatus, Step,
    UnsettledRun, UpstreamSync, UpstreamThreadId, append_messages, says_something, with_calls_of,
};
use crate::store::{Reply, RunEnd};
use crate::upstream::{Ended, Settled};

/// The end of a run as the gateway saw it.
#[derive(Clone, Debug)]
pub(in crate::runs) struct LocalOutcome {
    pub(in crate::runs) status: RunStatus,
    pub(in crate::runs) error: Option<RunError>,
    /// Whether a cancel, a deadline or a broken connection cut the run off. Then the upstream may
    /// know a better end.
    pub(in crate::runs) cut_off: bool,
    /// The thread's new place at the upstream, if the run moved it.
    pub(in crate::runs) thread: Option<UpstreamThreadId>,
    pub(in crate::runs) upstream_message_id: Option<String>,
    pub(in crate::runs) discard: bool,
}

impl LocalOutcome {
    /// Returns the outcome, and moves the text of the last round into the progress.
    pub(in crate::runs) fn of(result: Result<Ended, Failure>, progress: &mut Progress) -> Self {
        let ended = match result {
            Ok(ended) => ended,
            Err(failure) => {
                let cut_off = failure.cuts_off();
                let discard = matches!(failure, Failure::Conflict { .. });
                let (status, error) = if progress.busy {
                    failure.end_while_thread_busy()
                } else {
                    failure.end()
                };
                let text = std::mem::take(&mut progress.text);
                if text.is_empty() {
                    progress.rounds_before = progress.content.len();
                } else {
                    progress.said(text.into_parts(), None);
                }
                return Self {
                    status,
                    error,
                    cut_off,
                    thread: None,
                    upstream_message_id: None,
                    discard,
                };
            }
        };
        let (status, error) = if let Ok(status) = RunStatus::InProgress.on(Step::End(ended.status))
        {
            (status, ended.error)
        } else {
            let unusable = || {
                let message = format!(
                    "the upstream ended the run with {}, which is not the status of an ended run",
                    ended.status
                );
                RunError::new(RunErrorCode::UpstreamFailed, message)
            };
            let error = ended.error.unwrap_or_else(unusable);
            (RunStatus::Failed, Some(error))
        };
        if status != RunStatus::Completed {
            progress.open_calls = ended.tool_calls;
        }
        progress.said(ended.content, ended.usage);
        let is_empty = status == RunStatus::Completed && !says_something(&progress.content);
        if is_empty {
            return Self {
                status: RunStatus::Failed,
                error: Some(error.unwrap_or_else(without_reply)),
                cut_off: false,
                thread: None,
                upstream_message_id: None,
                discard: false,
            };
        }
        let error = error.filter(|_| status != RunStatus::Completed);
        Self {
            status,
            error,
            cut_off: false,
            thread: ended.thread,
            upstream_message_id: ended.upstream_message_id,
            discard: false,
        }
    }

    pub(in crate::runs) fn is_clean(&self) -> bool {
        self.status == RunStatus::Completed && !self.discard
    }
}

fn without_reply() -> RunError {
    RunError::new(
        RunErrorCode::UpstreamFailed,
        "the upstream completed the run without a reply",
    )
}

/// What is known of a run's traces at the upstream.
#[derive(Clone, Debug)]
pub(in crate::runs) enum UpstreamState {
    /// Everything is there, as it should be.
    Clean,
    /// The upstream took nothing.
    None,
    /// The gateway looked at the traces and, if `removed`, removed them.
    Seen { settled: Settled, removed: bool },
    /// The gateway could not look at the traces, or not remove them. It must do so before it uses
    /// the thread again.
    Unknown(UnsettledRun),
}

/// Returns the end of a run, from the end that the gateway saw and from the run's traces at the
/// upstream. Pure.
///
/// The rules:
///
/// - A message whose run never reached the model is withheld from the model for good.
/// - So is a message whose run the upstream reported as failed, unless the thread has the message.
///   It would break every later run.
/// - Any other message that the thread lacks is sent with the next run. So the upstream thread and
///   the transcript say the same in the end.
pub(in crate::runs) fn decide_outcome(
    local: &LocalOutcome,
    upstream: &UpstreamState,
    progress: &Progress,
    events: EventBatch,
) -> RunEnd {
    let mut end = RunEnd {
        status: local.status,
        error: local.error.clone(),
        usage: progress.usage,
        context_tokens: progress.context_tokens,
        upstream_run_id: progress.upstream_run.clone(),
        unacknowledged_requests: progress.unacknowledged_requests,
        upstream_thread_id: local.thread.clone(),
        reply: None,
        said: UpstreamSync::Present,
        synced: progress.synced,
        unsettled_run: None,
        discard: local.discard,
        keeps_said: progress.rerun.is_some(),
        events,
        drops_log: false,
    };
    let mut content = progress.content.clone();
    let mut upstream_message_id = local.upstream_message_id.clone();
    let mut reply_sync = UpstreamSync::Present;
    match upstream {
        UpstreamState::Clean => {}
        UpstreamState::None => {
            (end.said, reply_sync, end.synced) =
                (UpstreamSync::Withheld, UpstreamSync::Withheld, false);
            (end.upstream_thread_id, upstream_message_id) = (None, None);
        }
        UpstreamState::Unknown(left) => {
            (end.said, reply_sync, end.synced) =
                (UpstreamSync::Unknown, UpstreamSync::Unknown, false);
            (end.unsettled_run, end.upstream_thread_id) = (Some(left.clone()), None);
            // A message that may not be there cannot serve as an anchor.
            upstream_message_id = None;
        }
        UpstreamState::Seen { settled, removed } => {
            end.usage = settled.usage.or(end.usage);
            end.synced &= settled.said;
            // If the run's own messages are not there, the next run must not build on them.
            let moved = settled.thread.clone().or(end.upstream_thread_id);
            end.upstream_thread_id = moved.filter(|_| settled.said);
            end.said = if settled.said {
                UpstreamSync::Present
            } else if (local.status == RunStatus::Failed && !local.cut_off)
                || progress.delivery < Delivery::Accepted
            {
                UpstreamSync::Withheld
            } else {
                UpstreamSync::Missing
            };
            let has_reply = says_something(&settled.content)
                || (!settled.content.is_empty() && !says_something(&content));
            if settled.said && has_reply {
                // On a chain, the content is that of the last round only.
                if settled.thread.is_none() {
                    content = with_calls_of(&content, settled.content.clone());
                } else {
                    content = content_before(progress);
                    append_messages(&mut content, settled.content.clone());
                }
                upstream_message_id.clone_from(&settled.upstream_message_id);
            } else {
                reply_sync = match end.said {
                    UpstreamSync::Present => UpstreamSync::Missing,
                    other => other,
                };
                upstream_message_id = None;
            }
            let late =
                local.cut_off && settled.status == Some(RunStatus::Completed) && !local.discard;
            if late && says_something(&content) {
                // The upstream completed the run before the cancel, or the other cause, came. So
                // it is completed here too.
                (end.status, end.error) = (RunStatus::Completed, None);
            }
            if *removed {
                // A chain that does not move does not contain the history either.
                end.synced &= settled.thread.is_none();
                end.upstream_thread_id = None;
            }
        }
    }
    if let Some(rerun) = progress.rerun {
        end.said = said_again(rerun, upstream, progress, &end);
    }
    if !local.discard && !content.is_empty() {
        end.reply = Some(Reply {
            id: MessageId::new(),
            content,
            upstream_message_id,
            sync: reply_sync,
        });
    }
    end
}

/// Returns the state of messages that a run answered again. If the run changed nothing of them at
/// the upstream, they are as they were.
fn said_again(
    rerun: Rerun,
    upstream: &UpstreamState,
    progress: &Progress,
    end: &RunEnd,
) -> UpstreamSync {
    // A chain goes on from where it was, unless the run moved it.
    if progress.holds_input && end.upstream_thread_id.is_none() {
        return UpstreamSync::Present;
    }
    match upstream {
        UpstreamState::None if rerun == Rerun::Missing => UpstreamSync::Missing,
        UpstreamState::Seen { removed: true, .. } if end.said == UpstreamSync::Present => {
            UpstreamSync::Missing
        }
        _ => end.said,
    }
}

/// Returns the text of a reply that its readers have not seen. The upstream may have more of a
/// reply that was cut off here. So a reader of the deltas alone gets the whole text too.
pub(in crate::runs) fn text_not_yet_streamed(shown: &ReplyText, reply: &Reply) -> ReplyText {
    let rest = ReplyText::of(&reply.content).after(shown);
    rest.unwrap_or_default()
}

/// Returns the text from which the run's record can rebuild the log of a completed run.
pub(in crate::runs) fn told_by(end: &RunEnd) -> Option<ReplyText> {
    let reply = end
        .reply
        .as_ref()
        .filter(|_| end.status == RunStatus::Completed && !end.discard)?;
    Some(ReplyText::of(&reply.content))
}

/// Returns the content of the rounds before the last one.
fn content_before(progress: &Progress) -> Vec<ContentPart> {
    progress.content[..progress.rounds_before].to_vec()
}

/// Returns the end of a run that sent nothing to the upstream.
pub(in crate::runs) fn end_without_output(status: RunStatus, error: Option<RunError>) -> RunEnd {
    RunEnd {
        status,
        error,
        usage: None,
        context_tokens: None,
        upstream_run_id: None,
        unacknowledged_requests: 0,
        upstream_thread_id: None,
        reply: None,
        said: UpstreamSync::Withheld,
        synced: false,
        unsettled_run: None,
        discard: false,
        keeps_said: false,
        events: EventBatch {
            first: 0,
            events: Vec::new(),
        },
        drops_log: false,
    }
}

#[cfg(test)]
mod tests;
