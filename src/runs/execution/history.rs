//! The part of a transcript that an upstream thread gets: the newest messages for which there is
//! room.

use std::sync::Arc;

use super::ladder::LAST_MESSAGES;
use crate::domain::{ContentPart, HistoryKept, Message, Omitted, Page, Role, RunId};
use crate::store::{Store, StoreError};

/// Most messages of one read.
pub(in crate::runs) const PAGE: u32 = 500;
/// Most messages of a history, and most bytes of their content. That is several times what a model
/// reads, and more than the largest body that the gateway accepts by default. The history is in
/// memory, more than once, until the upstream has it.
pub(in crate::runs) const MAX_MESSAGES: usize = 5000;
pub(in crate::runs) const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Bytes of text that count as a token, and tokens that a picture or file counts. Tokenizers differ,
/// so this is an estimate.
const TOKEN_BYTES: usize = 4;
const MEDIA_TOKENS: usize = 1000;

/// Messages that an upstream thread lacks, oldest first. The task that creates the thread shares
/// them.
#[derive(Clone, Default)]
pub(in crate::runs) struct History {
    pub(in crate::runs) messages: Arc<Vec<Message>>,
    /// Number of user messages among them that come from the previous thread.
    pub(in crate::runs) carried_users: u32,
}

/// The whole conversation before a run, as far as there is room for it.
#[derive(Default)]
pub(in crate::runs) struct Past {
    /// Oldest first: the messages that were carried over, then the thread's own.
    pub(in crate::runs) messages: Vec<Message>,
    /// Number of those that were carried over.
    pub(in crate::runs) carried: usize,
    /// Number of messages for which there was no room, or whose content the store does not keep;
    /// a lower bound.
    pub(in crate::runs) lost: u32,
}

/// A part of the conversation, and what is missing in it.
pub(in crate::runs) struct Excerpt {
    pub(in crate::runs) history: History,
    pub(in crate::runs) omitted: Omitted,
    pub(in crate::runs) messages_left_out: u32,
    pub(in crate::runs) parts_replaced: u32,
}

impl Past {
    pub(in crate::runs) fn has_media(&self) -> bool {
        let mut parts = self.messages.iter().flat_map(|message| &message.content);
        parts.any(ContentPart::is_media)
    }

    /// Returns the newest part of the conversation that `kept` names.
    pub(in crate::runs) fn excerpt(mut self, kept: HistoryKept) -> Excerpt {
        let first = match kept {
            HistoryKept::All | HistoryKept::WithoutMedia => 0,
            HistoryKept::NewerHalf => self.middle(),
            HistoryKept::LastMessages => self.messages.len().saturating_sub(LAST_MESSAGES),
            HistoryKept::Nothing => self.messages.len(),
        };
        self.messages.drain(..first);
        let carried = self.carried.saturating_sub(first);
        let messages_left_out = self
            .lost
            .saturating_add(u32::try_from(first).unwrap_or(u32::MAX));
        let omitted = Omitted {
            any: messages_left_out > 0,
            before: self.messages.get(carried).map(|own| own.position),
            carried: u32::try_from(carried).unwrap_or(u32::MAX),
        };
        let mut parts_replaced = 0;
        if kept == HistoryKept::WithoutMedia {
            let parts = self.messages.iter_mut().flat_map(|it| &mut it.content);
            for part in parts.filter(|part| part.is_media()) {
                let text = MEDIA_NOTE.to_owned();
                *part = ContentPart::text(text);
                parts_replaced += 1;
            }
        }
        Excerpt {
            history: History {
                carried_users: count_users(&self.messages[..carried]),
                messages: Arc::new(self.messages),
            },
            omitted,
            messages_left_out,
            parts_replaced,
        }
    }

    /// Returns the index from which on the messages have at most half of the content.
    fn middle(&self) -> usize {
        let sizes = self.messages.iter().map(size);
        let half = sizes.clone().sum::<usize>() / 2;
        let mut rest = 0;
        let newest = sizes.rev().take_while(|size| {
            rest += size;
            rest <= half
        });
        self.messages.len() - newest.count()
    }
}

/// What the model reads in the place of a picture or file that it cannot get any more.
const MEDIA_NOTE: &str = "[A picture or file of this message is no longer available.]";

/// Returns the size of a message's content in bytes.
fn size(message: &Message) -> usize {
    message.content.iter().map(ContentPart::size).sum()
}

/// Estimates the tokens of a message.
pub(in crate::runs) fn estimated_tokens(content: &[ContentPart]) -> usize {
    let tokens = content.iter().map(|part| {
        if part.is_media() {
            MEDIA_TOKENS
        } else {
            part.size().div_ceil(TOKEN_BYTES)
        }
    });
    tokens.sum()
}

/// The room that is left in a history.
pub(in crate::runs) struct Room {
    messages: usize,
    bytes: usize,
    tokens: usize,
    /// Whether a message did not fit. No older one is sent either, because a conversation with
    /// gaps has another meaning.
    pub(in crate::runs) is_full: bool,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            messages: MAX_MESSAGES,
            bytes: MAX_BYTES,
            tokens: usize::MAX,
            is_full: false,
        }
    }
}

impl Room {
    /// Returns the room for messages that are carried over into a fresh thread.
    pub(in crate::runs) fn for_carried(self, max_tokens: u32) -> Self {
        Self {
            tokens: usize::try_from(max_tokens).unwrap_or(usize::MAX),
            ..self
        }
    }

    fn take(&mut self, message: &Message) -> bool {
        let bytes = size(message);
        let left = (
            self.messages.checked_sub(1),
            self.bytes.checked_sub(bytes),
            self.tokens.checked_sub(estimated_tokens(&message.content)),
        );
        match left {
            (Some(messages), Some(bytes), Some(tokens)) if !self.is_full => {
                (self.messages, self.bytes, self.tokens) = (messages, bytes, tokens);
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
