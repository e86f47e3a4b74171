//! The part of a transcript that an upstream thread gets: the newest messages for which there is
//! room.

use std::sync::Arc;

use crate::domain::{ContentPart, Message, Page, Role, RunId};
use crate::store::{Store, StoreError};

/// Most messages of one read.
pub(in crate::runs) const PAGE: u32 = 500;
/// Most messages of a history, and most bytes of their content. That is several times what a model
/// reads, and more than the largest body that the gateway accepts by default. The history is in
/// memory, more than once, until the upstream has it.
pub(in crate::runs) const MAX_MESSAGES: usize = 5000;
pub(in crate::runs) const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Messages that an upstream thread lacks, oldest first. The task that creates the thread shares
/// them.
#[derive(Default)]
pub(in crate::runs) struct History {
    pub(in crate::runs) messages: Arc<Vec<Message>>,
    /// Number of user messages among them that come from the previous thread.
    pub(in crate::runs) carried_users: u32,
}

/// The room that is left in a history.
pub(in crate::runs) struct Room {
    messages: usize,
    bytes: usize,
    /// Whether a message did not fit. No older one is sent either, because a conversation with
    /// gaps has another meaning.
    pub(in crate::runs) is_full: bool,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            messages: MAX_MESSAGES,
            bytes: MAX_BYTES,
            is_full: false,
        }
    }
}

impl Room {
    fn take(&mut self, message: &Message) -> bool {
        let bytes = message.content.iter().map(ContentPart::size).sum();
        match (self.messages.checked_sub(1), self.bytes.checked_sub(bytes)) {
            (Some(messages), Some(bytes)) if !self.is_full => {
                (self.messages, self.bytes) = (messages, bytes);
            }
            _ => self.is_full = true,
        }
        !self.is_full
    }
}

/// Returns the newest messages for which there is room, oldest first. Reads them backwards in
/// pages, each before the last position of the previous page.
pub(in crate::runs) async fn newest<E, F>(
    room: &mut Room,
    read: impl Fn(Option<i64>) -> F,
) -> Result<Vec<Message>, E>
where
    F: Future<Output = Result<Page<Message>, E>>,
{
    let mut messages: Vec<Message> = Vec::new();
    let mut has_more = true;
    while has_more && !room.is_full {
        let page = read(messages.last().map(|message| message.position)).await?;
        has_more = page.has_more && !page.data.is_empty();
        messages.extend(
            page.data
                .into_iter()
                .take_while(|message| room.take(message)),
        );
    }
    messages.reverse();
    Ok(messages)
}

/// Returns the unsynced messages that were sent with a run.
pub(in crate::runs) async fn sent_with(
    store: &Store,
    run: RunId,
) -> Result<Vec<Message>, StoreError> {
    let unsynced = newest(&mut Room::default(), |before| {
        store.unsynced_messages(run, before, PAGE)
    })
    .await?;
    Ok(with_content(unsynced))
}

/// Drops messages whose content the store did not keep.
pub(in crate::runs) fn with_content(mut messages: Vec<Message>) -> Vec<Message> {
    messages.retain(|message| !message.content.is_empty());
    messages
}

/// Returns the number of user messages.
pub(in crate::runs) fn count_users(messages: &[Message]) -> u32 {
    let users = messages
        .iter()
        .filter(|message| message.role == Role::User)
        .count();
    u32::try_from(users).unwrap_or(u32::MAX)
}
