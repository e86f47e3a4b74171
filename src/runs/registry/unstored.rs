//! `store.transcript = "off"`: this process holds what the store does not keep of a run, for as long as it works on the
//! run, in the run's entry of the registry.
//!
//! Content that is lost with a process is never replaced by something empty: a run that cannot say what it was to say ends,
//! and a message that the upstream lacks is withheld from it for good.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::domain::{MessageId, RequiredAction};
use crate::store::InputMessage;

/// What is held of an unfinished run.
#[derive(Clone, Default)]
pub(in crate::runs) struct Unstored(Arc<Mutex<Content>>);

#[derive(Default)]
pub(in crate::runs) struct Content {
    /// What the user says, or is to say.
    pub(in crate::runs) input: Vec<InputMessage>,
    /// The calls that the run asked for last.
    pub(in crate::runs) asked: Option<RequiredAction>,
}

impl Unstored {
    /// A message is one of the run's now, if it was not yet.
    pub(in crate::runs) fn add(&self, message: &InputMessage) {
        let mut content = self.lock();
        if content.input.iter().all(|it| it.id != message.id) {
            content.input.push(message.clone());
        }
    }

    pub(in crate::runs) fn remove(&self, message: MessageId) {
        self.lock().input.retain(|it| it.id != message);
    }

    /// Nothing in here panics half-way through a change.
    pub(in crate::runs) fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Unstored {
    /// Without what is held.
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
            content: vec![ContentPart::Text {
                text: text.to_owned(),
            }],
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
