//! Decides how a run ends: from how it ended here, and from what the upstream holds of it. Pure.

use super::failure::Failure;
use super::progress::{Delivery, Progress};
use crate::domain::{
    ContentPart, EventBatch, MessageId, RunError, RunErrorCode, RunStatus, Step, UnsettledRun,
    UpstreamSync, UpstreamThreadId,
};
use crate::store::{Reply, RunEnd};
use crate::upstream::{Ended, Settled};

/// How a run ended as far as the gateway saw it.
#[derive(Clone, Debug)]
pub(in crate::runs) struct LocalOutcome {
    pub(in crate::runs) status: RunStatus,
    pub(in crate::runs) error: Option<RunError>,
    /// A cancel, a deadline or a broken connection cut it off: the upstream may know of a better end.
    pub(in crate::runs) cut_off: bool,
    /// Where the thread stands upstream from now on, if the run moved it.
    pub(in crate::runs) thread: Option<UpstreamThreadId>,
    pub(in crate::runs) upstream_message_id: Option<String>,
    pub(in crate::runs) discard: bool,
}

impl LocalOutcome {
    /// Moves what was said into the progress.
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
                    progress.said(vec![ContentPart::Text { text }], None);
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
            let message = format!(
                "the upstream ended the run with the status {}, which is none",
                ended.status
            );
            (
                RunStatus::Failed,
                Some(RunError {
                    code: RunErrorCode::UpstreamFailed,
                    message,
                }),
            )
        };
        if status != RunStatus::Completed {
            progress.open_calls = ended.tool_calls;
        }
        progress.said(ended.content, ended.usage);
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

/// What is known of a run's upstream upstream.
#[derive(Clone, Debug)]
pub(in crate::runs) enum UpstreamState {
    /// All of it is there, as it should be.
    Clean,
    /// Nothing was taken.
    None,
    /// It was looked at. `removed`: and taken away.
    Seen { settled: Settled, removed: bool },
    /// It could not be looked at, or not taken away: to be done before the thread is used again.
    Unknown(UnsettledRun),
}

/// The end of a run, from what the gateway saw of it and what is left of it upstream. Pure.
///
/// The rules: a message whose run never reached the model is withheld from it for good. So is a message whose run the upstream
/// reported as failed, unless the thread holds it, lest it break every run to come. What else the thread lacks is sent with
/// the next run, so that in the end the upstream thread and the transcript say the same.
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
        upstream_run_id: progress.upstream_run.clone(),
        unacknowledged_requests: progress.unacknowledged_requests,
        upstream_thread_id: local.thread.clone(),
        reply: None,
        said: UpstreamSync::Present,
        synced: progress.synced,
        unsettled_run: None,
        discard: local.discard,
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
            // What is not known to be there is no mark to go by.
            upstream_message_id = None;
        }
        UpstreamState::Seen { settled, removed } => {
            let late =
                local.cut_off && settled.status == Some(RunStatus::Completed) && !local.discard;
            if late {
                // It was done before the cancel, or whatever cut it off, came: then it is done here too.
                (end.status, end.error) = (RunStatus::Completed, None);
            }
            end.usage = settled.usage.or(end.usage);
            end.synced &= settled.said;
            // Where the run's own turn is not, the next one must not build on.
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
            if settled.said && !settled.content.is_empty() {
                // On a chain it is that of the last round alone.
                content = if settled.thread.is_none() {
                    Vec::new()
                } else {
                    content_before(progress)
                };
                content.extend(settled.content.iter().cloned());
                upstream_message_id.clone_from(&settled.upstream_message_id);
            } else {
                reply_sync = match end.said {
                    UpstreamSync::Present => UpstreamSync::Missing,
                    other => other,
                };
                upstream_message_id = None;
            }
            if *removed {
                // A chain that does not move has not taken in the history either.
                end.synced &= settled.thread.is_none();
                end.upstream_thread_id = None;
            }
        }
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

/// What readers have yet to see of a reply: the upstream may have more of one that was cut off here. A reader of the deltas
/// alone gets the whole text too.
pub(in crate::runs) fn text_not_yet_streamed(shown: &str, reply: &Reply) -> Option<String> {
    let text: String = reply
        .content
        .iter()
        .filter_map(ContentPart::as_text)
        .collect();
    text.strip_prefix(shown)
        .filter(|rest| !rest.is_empty())
        .map(str::to_owned)
}

/// The text that the record tells of a run which ends well.
pub(in crate::runs) fn told_by(end: &RunEnd) -> Option<String> {
    let reply = end
        .reply
        .as_ref()
        .filter(|_| end.status == RunStatus::Completed && !end.discard)?;
    Some(
        reply
            .content
            .iter()
            .filter_map(ContentPart::as_text)
            .collect(),
    )
}

/// What the rounds before the last one said.
fn content_before(progress: &Progress) -> Vec<ContentPart> {
    progress.content[..progress.rounds_before].to_vec()
}

/// The end of a run of which nothing went upstream.
pub(in crate::runs) fn end_without_output(status: RunStatus, error: Option<RunError>) -> RunEnd {
    RunEnd {
        status,
        error,
        usage: None,
        upstream_run_id: None,
        unacknowledged_requests: 0,
        upstream_thread_id: None,
        reply: None,
        said: UpstreamSync::Withheld,
        synced: false,
        unsettled_run: None,
        discard: false,
        events: EventBatch {
            first: 0,
            events: Vec::new(),
        },
        drops_log: false,
    }
}

#[cfg(test)]
mod tests;
