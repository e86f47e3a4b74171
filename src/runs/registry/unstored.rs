//! The content of runs under `store.transcript = "off"`. The store does not keep it, so this
//! process holds it in the registry while it works on the run.
//!
//! Content that is lost with a process is never replaced by empty content. A run that lost its
//! input ends. A message that the upstream lacks is withheld from it for good.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::domain::{MessageId, RequiredAction};
use crate::store::InputMessage;

/// The content that this process holds of an unfinished run.
#[derive(Clone, Default)]
pub(in crate::runs) struct Unstored(Arc<Mutex<Content>>);

#[derive(Default)]
pub(in crate::runs) struct Content {
    /// The user's messages.
    pub(in crate::runs) input: Vec<InputMessage>,
    /// The calls that the run asked for last.
    pub(in crate::runs) asked: Option<RequiredAction>,
}

impl Unstored {
    /// Adds a message to the run, unless the run has it.
    pub(in crate::runs) fn add(&self, message: &InputMessage) {
        let mut content = self.lock();
        if content.input.iter().all(|it| it.id != message.id) {
            content.input.push(message.clone());
        }
    }

    pub(in crate::runs) fn remove(&self, message: MessageId) {
        self.lock().input.retain(|it| it.id != message);
    }

    /// No code panics between the two halves of a change, so the poison can be ignored.
    pub(in crate::runs) fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Unstored {
    /// Leaves the content out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unstored")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ContentPart;

    fn message(text: &str) -> InputMessage {
        InputMessage {
            id: MessageId::new(),
            content: vec![ContentPart::text(text)],
        }
    }

    #[test]
    fn message_is_added_once() {
        let (unstored, said) = (Unstored::default(), message("one"));
        unstored.add(&said);
        unstored.add(&said);
        assert_eq!(unstored.lock().input.len(), 1);
        unstored.remove(said.id);
        assert_eq!(unstored.lock().input, []);
    }
}
