//! What an upstream thread is told of the transcript: the newest messages for which there is room.

use std::sync::Arc;

use crate::domain::{ContentPart, Message, Page, Role, RunId};
use crate::store::{Store, StoreError};

/// Messages read at a time.
pub(in crate::runs) const PAGE: u32 = 500;
/// Messages that an upstream thread is told at once, and bytes of their content: several times what a model reads, and more
/// than the largest body that is taken by default. All of them are in memory, more than once, until the upstream has them.
pub(in crate::runs) const MAX_MESSAGES: usize = 5000;
pub(in crate::runs) const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Messages that an upstream thread lacks, oldest first. The task that makes the thread shares them.
#[derive(Default)]
pub(in crate::runs) struct History {
    pub(in crate::runs) messages: Arc<Vec<Message>>,
    /// How many of the user's among them come from the thread before.
    pub(in crate::runs) carried_users: u32,
}

/// How much more an upstream thread may be told.
pub(in crate::runs) struct Room {
    messages: usize,
    bytes: usize,
    /// A message did not fit. No older one is sent either, since a story with gaps is another one.
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
                (self.messages, self.bytes) = (messages, bytes)
            }
            _ => self.is_full = true,
        }
        !self.is_full
    }
}

/// The newest messages for which there is room, oldest first. They are read backwards in pages, each before the position
/// at which the last one ended.
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

/// What the upstream thread of a run lacked, as far as it was sent with the run.
pub(in crate::runs) async fn sent_with(
    store: &Store,
    run: RunId,
) -> Result<Vec<Message>, StoreError> {
    let backlog = newest(&mut Room::default(), |before| {
        store.unsynced_messages(run, before, PAGE)
    })
    .await?;
    Ok(with_content(backlog))
}

/// Without the messages of which the store kept no content.
pub(in crate::runs) fn with_content(mut messages: Vec<Message>) -> Vec<Message> {
    messages.retain(|message| !message.content.is_empty());
    messages
}

/// How many of them are the user's.
pub(in crate::runs) fn count_users(messages: &[Message]) -> u32 {
    let users = messages
        .iter()
        .filter(|message| message.role == Role::User)
        .count();
    u32::try_from(users).unwrap_or(u32::MAX)
}
