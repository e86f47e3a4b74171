//! Compares a transcript with its upstream thread, and copies messages of other writers into the
//! transcript.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use similar::{Algorithm, DiffOp, capture_diff_slices_deadline};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::context::Context;
use crate::domain::{
    self, ContentPart, Message, MessageId, Role, Thread, ThreadId, UnsettledRun, UpstreamThreadId,
};
use crate::error::Error;
use crate::store::{ExternalMessage, RunLease, Store, StoreError};
use crate::upstream::{HistoryEntry, RateLimiter, Upstream, UpstreamError};

/// Most messages of one read.
const PAGE: u32 = 500;

/// The differences between a transcript and its upstream thread.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Differences {
    /// Messages that the upstream thread should have and lacks.
    pub missing: Vec<MessageId>,
    /// Messages of the upstream thread that the transcript lacks, each with the position of the
    /// message before it.
    pub external: Vec<(i64, HistoryEntry)>,
    /// Number of messages in the upstream thread.
    pub held: usize,
}

/// The result of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub enum Verified {
    /// The upstream has the thread.
    Compared(Differences),
    /// The upstream does not have the thread.
    Gone,
    /// The gateway's thread has no upstream thread yet, or no longer.
    NoThread,
    /// The server cannot list the messages, the thread is too long, or the store lacks some
    /// content.
    CannotTell,
}

/// The reason why a comparison has no result.
#[derive(Debug, thiserror::Error)]
pub enum Unverified {
    #[error("the database failed")]
    Store(#[from] StoreError),
    #[error("the upstream failed")]
    Upstream(#[from] UpstreamError),
    #[error("the upstream did not return the thread's messages in time")]
    TooLate,
    #[error("the configuration does not name the thread's upstream")]
    NotConfigured,
    #[error("another replica may have taken over the thread's active run")]
    LeaseLost,
}

impl From<Unverified> for Error {
    fn from(error: Unverified) -> Self {
        match error {
            Unverified::Store(error) => error.into(),
            Unverified::Upstream(error) => Self::UpstreamFailed(error),
            Unverified::TooLate => Self::UpstreamTooSlow,
            Unverified::LeaseLost => Self::StoreUnavailable(None),
            Unverified::NotConfigured => Self::Invalid(
                "the configuration does not name this thread's upstream, or no longer".to_owned(),
            ),
        }
    }
}

/// Compares a thread with its upstream thread, within `runs.settle_timeout`. A run that works
/// meanwhile shows as a difference.
///
/// # Errors
/// The store or the upstream failed.
pub(in crate::runs) async fn verify(
    ctx: &Context,
    thread: &Thread,
    pace: &RateLimiter,
) -> Result<Verified, Unverified> {
    let compared = async {
        let _permit = ctx.comparisons.acquire().await;
        compared(ctx, thread, pace).await
    };
    let limit = ctx.config.runs.settle_timeout;
    timeout(limit, compared)
        .await
        .unwrap_or(Err(Unverified::TooLate))
}

async fn compared(
    ctx: &Context,
    thread: &Thread,
    pace: &RateLimiter,
) -> Result<Verified, Unverified> {
    let Some(id) = &thread.upstream_thread_id else {
        return Ok(Verified::NoThread);
    };
    let upstream = ctx
        .upstream(&thread.upstream)
        .ok_or(Unverified::NotConfigured)?;
    // Read the transcript last, so that it also has messages that the gateway added to the upstream
    // thread meanwhile.
    let theirs = match history(&**upstream, id, pace).await {
        Err(UpstreamError::ThreadGone) => return Ok(Verified::Gone),
        Ok(None) => return Ok(Verified::CannotTell),
        theirs => theirs?.unwrap_or_default(),
    };
    let Some(ours) = transcript(&ctx.store, thread).await? else {
        return Ok(Verified::CannotTell);
    };
    // These messages date from a time when the store kept no content.
    if ours
        .iter()
        .any(|message| message.content.is_empty() && message.sync != domain::UpstreamSync::Withheld)
    {
        return Ok(Verified::CannotTell);
    }
    let thread = thread.id;
    let compared =
        spawn_blocking(move || compare(&ours, thread, theirs, Instant::now() + DIFF_TIME)).await;
    Ok(compared
        .ok()
        .flatten()
        .map_or(Verified::CannotTell, Verified::Compared))
}

/// Copies messages that other writers added to the upstream thread into the transcript, if the
/// configuration allows other writers there. `by` is the lease of the thread's active run, if
/// there is one. Returns the number of messages.
///
/// # Errors
/// The store or the upstream failed. Then all messages were copied, or none.
pub(in crate::runs) async fn reconcile(
    ctx: &Context,
    thread: &Thread,
    by: Option<RunLease>,
    pace: &RateLimiter,
) -> Result<u64, Unverified> {
    if !ctx
        .upstreams
        .get(&thread.upstream)
        .is_some_and(|upstream| upstream.has_external_writers)
        || !ctx.store.keeps_content()
    {
        return Ok(0);
    }
    // An earlier run's traces are the gateway's own, and would look like another writer's
    // messages.
    if let (Some(left), Some(upstream)) = (&thread.unsettled_run, ctx.upstream(&thread.upstream)) {
        if by.is_some() && ctx.registry.has_lapsed() {
            // The messages there may be those of the run's new owner.
            return Err(Unverified::LeaseLost);
        }
        let limit = ctx.config.runs.settle_timeout;
        timeout(limit, clear(ctx, &**upstream, left, by))
            .await
            .map_err(|_| Unverified::TooLate)??;
    }
    let external = match verify(ctx, thread, pace).await {
        Ok(Verified::Compared(differences)) => differences.external,
        Ok(Verified::Gone | Verified::NoThread | Verified::CannotTell)
        | Err(Unverified::NotConfigured) => {
            return Ok(0);
        }
        Err(error) => return Err(error),
    };
    let external: Vec<ExternalMessage> = external
        .into_iter()
        .filter(|(_, entry)| !entry.content.is_empty())
        .map(|(after, entry)| ExternalMessage {
            id: MessageId::new(),
            after,
            role: entry.role,
            content: entry.content,
            upstream_message_id: Some(entry.id),
            created_at: entry.created_at,
        })
        .collect();
    if external.is_empty() {
        return Ok(0);
    }
    let added = ctx
        .store
        .insert_external_messages(thread.id, by, &external)
        .await?;
    tracing::info!(thread.id = %thread.id, messages = added, "copied messages of other writers");
    Ok(added)
}

/// Removes an earlier run's messages from the upstream thread. A run that holds the thread (`by`)
/// may continue on it, so the store learns first which history stays there.
async fn clear(
    ctx: &Context,
    upstream: &dyn Upstream,
    left: &UnsettledRun,
    by: Option<RunLease>,
) -> Result<(), Unverified> {
    let settled = upstream.settle(left).await?;
    if let Some(lease) = by {
        if settled.has_history_of(left) {
            ctx.store.took_along(&lease, left.run).await?;
        }
        if ctx.registry.has_lapsed() {
            return Err(Unverified::LeaseLost);
        }
    }
    Ok(upstream.remove(left).await?)
}

/// Most bytes kept of an upstream thread for a comparison, and most pages read. A server may
/// return pages without end.
const MAX_HISTORY: usize = 32 * 1024 * 1024;
const MAX_HISTORY_PAGES: usize = 2000;
/// Longest time for the search for differences, which grows with their number.
const DIFF_TIME: Duration = Duration::from_secs(2);
/// Bytes that an entry, or a part of one, takes besides its texts.
const ENTRY_COST: usize = 200;
const PART_COST: usize = 100;

/// Returns all messages of an upstream thread, oldest first; `None` if the server cannot list
/// them, or has too many.
async fn history(
    upstream: &dyn Upstream,
    id: &UpstreamThreadId,
    pace: &RateLimiter,
) -> Result<Option<Vec<HistoryEntry>>, UpstreamError> {
    let (mut all, mut after, mut held) = (Vec::new(), None::<String>, 0);
    for _ in 0..MAX_HISTORY_PAGES {
        let Some(some) = upstream.history(id, after.as_deref(), pace).await? else {
            return Ok(None);
        };
        held += some
            .entries
            .iter()
            .map(|entry| cost(&entry.content))
            .sum::<usize>();
        if held > MAX_HISTORY {
            break;
        }
        all.extend(some.entries);
        match some.next {
            Some(next) if after.as_ref() != Some(&next) => after = Some(next),
            _ => return Ok(Some(all)),
        }
    }
    tracing::warn!("the upstream thread is too long to be compared with its transcript");
    Ok(None)
}

fn cost(content: &[ContentPart]) -> usize {
    ENTRY_COST
        + content
            .iter()
            .map(|part| PART_COST + part.size())
            .sum::<usize>()
}

/// Returns all messages that the upstream thread may have: those carried over, and the thread's
/// own transcript. Returns `None` if they are too many.
async fn transcript(store: &Store, thread: &Thread) -> Result<Option<Vec<Message>>, StoreError> {
    let (mut all, mut held) = (Vec::new(), 0);
    let mut keep = |page: &[Message]| {
        held += page
            .iter()
            .map(|message| cost(&message.content))
            .sum::<usize>();
        if held > MAX_HISTORY {
            tracing::warn!("the transcript is too long to be compared with its upstream thread");
        }
        held <= MAX_HISTORY
    };
    let mut has_more = thread.carried > 0;
    while has_more {
        let before = all.last().map(|message: &Message| message.position);
        let page = store.carried(thread.id, before, PAGE).await?;
        if !keep(&page.data) {
            return Ok(None);
        }
        has_more = page.has_more && !page.data.is_empty();
        all.extend(page.data);
    }
    all.reverse();
    let mut after = 0;
    loop {
        let page = store.transcript(thread.id, after, PAGE).await?;
        let Some(last) = page.last() else {
            return Ok(Some(all));
        };
        after = last.position;
        if !keep(&page) {
            return Ok(None);
        }
        all.extend(page);
    }
}

/// Compares the content part by part, because a reply of several rounds is one message here and
/// several there. Returns `None` if the time is up.
fn compare(
    ours: &[Message],
    thread: ThreadId,
    theirs: Vec<HistoryEntry>,
    deadline: Instant,
) -> Option<Differences> {
    let held = theirs.len();
    let known: HashMap<&str, usize> = ours
        .iter()
        .enumerate()
        .filter_map(|(n, message)| Some((message.upstream_message_id.as_deref()?, n)))
        .collect();
    let here: Vec<(usize, Part<'_>)> = ours
        .iter()
        .enumerate()
        .filter(|(_, message)| message.sync != domain::UpstreamSync::Withheld)
        .flat_map(|(n, message)| parts(message.role, &message.content).map(move |part| (n, part)))
        .collect();
    let there: Vec<(usize, Part<'_>)> = theirs
        .iter()
        .enumerate()
        .flat_map(|(n, entry)| parts(entry.role, &entry.content).map(move |part| (n, part)))
        .collect();
    // The index of the transcript's message for each entry of the upstream.
    let mut belongs: HashMap<usize, usize> = HashMap::new();
    let differences = capture_diff_slices_deadline(
        Algorithm::Patience,
        &said(&here),
        &said(&there),
        Some(deadline),
    );
    // After the deadline, the differences are a guess.
    if Instant::now() >= deadline {
        tracing::warn!("a transcript and its upstream thread differ too much for a comparison");
        return None;
    }
    for op in differences {
        if let DiffOp::Equal {
            old_index,
            new_index,
            len,
        } = op
        {
            for n in 0..len {
                belongs.insert(there[new_index + n].0, here[old_index + n].0);
            }
        }
    }
    for (n, entry) in theirs.iter().enumerate() {
        if let Some(message) = known.get(entry.id.as_str()) {
            belongs.insert(n, *message);
        }
    }
    let found: HashSet<usize> = belongs.values().copied().collect();
    let is_missing = |(n, message): &(usize, &Message)| {
        message.thread_id == thread
            && message.sync == domain::UpstreamSync::Present
            && parts(message.role, &message.content).next().is_some()
            && !found.contains(n)
    };
    let missing = ours
        .iter()
        .enumerate()
        .filter(is_missing)
        .map(|(_, message)| message.id)
        .collect();
    let mut position = 0;
    let mut external = Vec::new();
    for (n, entry) in theirs.into_iter().enumerate() {
        match belongs.get(&n).map(|message| &ours[*message]) {
            // Messages that were carried over come before all positions of this thread.
            Some(message) if message.thread_id == thread => {
                position = position.max(message.position);
            }
            Some(_) => {}
            None if entry.is_tagged => {}
            None => external.push((position, entry)),
        }
    }
    Some(Differences {
        missing,
        external,
        held,
    })
}

/// A part of a message: whether it is the user's, and its content.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct Part<'a>(bool, Cow<'a, str>);

fn said<'a>(parts: &[(usize, Part<'a>)]) -> Vec<Part<'a>> {
    parts.iter().map(|(_, part)| part.clone()).collect()
}

fn parts(role: Role, content: &[ContentPart]) -> impl Iterator<Item = Part<'_>> {
    content.iter().filter_map(move |part| {
        let said = match part {
            ContentPart::Text { text, .. } => text.as_str().into(),
            ContentPart::Refusal { refusal, .. } => refusal.as_str().into(),
            ContentPart::ImageUrl { image_url } => format!("url {}", image_url.url).into(),
            ContentPart::ImageFile { image_file } => format!("file {}", image_file.file_id).into(),
            ContentPart::File { file } => {
                format!("file {}", file.sources().next().unwrap_or_default()).into()
            }
            // They are in no message of the upstream thread.
            ContentPart::GeneratedImage { .. } | ContentPart::ToolCall { .. } => return None,
        };
        Some(Part(role == Role::User, said))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::UpstreamSync;

    fn text(text: &str) -> Vec<ContentPart> {
        vec![ContentPart::text(text)]
    }

    fn compare(ours: &[Message], thread: ThreadId, theirs: Vec<HistoryEntry>) -> Differences {
        super::compare(
            ours,
            thread,
            theirs,
            Instant::now() + Duration::from_mins(1),
        )
        .unwrap()
    }

    #[test]
    fn a_comparison_that_takes_too_long_is_no_answer() {
        let thread = ThreadId::new();
        let of = |name: &'static str| (0..100_000).map(move |n| format!("{name} {n}"));
        let ours: Vec<_> = (1..)
            .zip(of("a"))
            .map(|(n, said)| message(thread, n, Role::User, &[&said]))
            .collect();
        let theirs = of("b")
            .map(|said| entry(&said, Role::User, &said))
            .collect();
        let begun = Instant::now();
        let limit = Duration::from_millis(100);
        assert_eq!(super::compare(&ours, thread, theirs, begun + limit), None);
        // Much less than a minute.
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{:?}",
            begun.elapsed()
        );
    }

    fn message(thread: ThreadId, position: i64, role: Role, parts: &[&str]) -> Message {
        Message {
            id: MessageId::new(),
            thread_id: thread,
            position,
            role,
            content: parts.iter().flat_map(|part| text(part)).collect(),
            run_id: None,
            upstream_message_id: None,
            sync: UpstreamSync::Present,
            ended: None,
            created_at: "2026-11-22T09:00:00Z".parse().unwrap(),
        }
    }

    fn entry(id: &str, role: Role, said: &str) -> HistoryEntry {
        HistoryEntry {
            id: id.to_owned(),
            role,
            content: text(said),
            created_at: None,
            is_tagged: false,
        }
    }

    fn external(found: &Differences) -> Vec<(i64, &str)> {
        found
            .external
            .iter()
            .map(|(after, entry)| (*after, entry.id.as_str()))
            .collect()
    }

    #[test]
    fn what_others_wrote_is_found_where_it_stands() {
        let (thread, before) = (ThreadId::new(), ThreadId::new());
        let ours = [
            message(before, 7, Role::User, &["carried"]),
            message(thread, 1, Role::User, &["hello"]),
            message(thread, 2, Role::Assistant, &["let me see", "hi"]),
            message(thread, 5, Role::User, &["yes"]),
            message(thread, 6, Role::Assistant, &["done"]),
        ];
        let theirs = vec![
            entry("a", Role::User, "carried"),
            entry("b", Role::User, "first of all"),
            entry("c", Role::User, "hello"),
            entry("d", Role::Assistant, "let me see"),
            entry("e", Role::Assistant, "hi"),
            entry("f", Role::User, "psst"),
            entry("g", Role::Assistant, "what?"),
            entry("h", Role::User, "yes"),
            entry("i", Role::Assistant, "done"),
            entry("j", Role::User, "yes"),
        ];
        let found = compare(&ours, thread, theirs);
        assert_eq!(external(&found), [(0, "b"), (2, "f"), (2, "g"), (6, "j")]);
        assert_eq!((found.missing.as_slice(), found.held), (&[][..], 10));
    }

    #[test]
    fn what_the_upstream_lacks_is_told_unless_it_is_known_to_lack_it() {
        let thread = ThreadId::new();
        let mut withheld = message(thread, 3, Role::User, &["never sent"]);
        withheld.sync = UpstreamSync::Withheld;
        let mut late = message(thread, 4, Role::User, &["later"]);
        late.sync = UpstreamSync::Missing;
        let ours = [
            message(thread, 1, Role::User, &["hello"]),
            message(thread, 2, Role::Assistant, &["hi"]),
            withheld,
            late,
        ];
        let found = compare(&ours, thread, vec![entry("a", Role::User, "hello")]);
        assert_eq!(found.missing, [ours[1].id]);
        assert!(found.external.is_empty());
    }

    #[test]
    fn an_id_or_a_tag_of_ours_counts_more_than_the_text() {
        let thread = ThreadId::new();
        let mut reply = message(thread, 2, Role::Assistant, &["hi there"]);
        reply.upstream_message_id = Some("msg_1".to_owned());
        let ours = [message(thread, 1, Role::User, &["hello"]), reply];
        let mut tagged = entry("msg_0", Role::User, "  hello");
        tagged.is_tagged = true;
        let found = compare(
            &ours,
            thread,
            vec![tagged, entry("msg_1", Role::Assistant, "hi  there")],
        );
        assert!(found.external.is_empty(), "{found:?}");
        assert_eq!(
            found.missing,
            [ours[0].id],
            "the tag says that the message is the gateway's, not which one"
        );
    }

    proptest! {
        /// Whatever other writers put in between, the gateway's messages are never taken for
        /// theirs, and none is lost.
        #[test]
        fn ours_stay_ours(script in proptest::collection::vec((any::<bool>(), any::<bool>(), 0..4_u8), 0..40)) {
            let thread = ThreadId::new();
            let (mut ours, mut theirs, mut others) = (Vec::new(), Vec::new(), 0);
            for (n, (is_ours, is_user, word)) in script.into_iter().enumerate() {
                let role = if is_user { Role::User } else { Role::Assistant };
                let id = format!("item_{n}");
                // Other writers use other words here; only ids can tell the same words apart.
                let said = if is_ours { format!("word {word}") } else { format!("other {word}") };
                if is_ours {
                    let position = i64::try_from(ours.len() + 1).unwrap();
                    ours.push(message(thread, position, role, &[&said]));
                } else {
                    others += 1;
                }
                theirs.push(entry(&id, role, &said));
            }
            let found = compare(&ours, thread, theirs);
            prop_assert_eq!(found.external.len(), others);
            prop_assert!(found.missing.is_empty());
            prop_assert!(found.external.is_sorted_by_key(|(after, _)| *after));
        }
    }
}
