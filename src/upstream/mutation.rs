//! Test helpers for code that reads upstream answers: real answers and streams with some places
//! changed.

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use proptest::prelude::*;
use serde_json::Value;

use crate::domain::ContentPart;
use crate::testing::{self, Words};
use crate::upstream::port::UpstreamEvent;
use crate::upstream::relay::{Decoder, relay_within};
use crate::upstream::sse::events;

/// Words of the protocols.
const WORDS: Words = Words {
    texts: &[
        "completed",
        "failed",
        "cancelled",
        "requires_action",
        "assistant",
        "user",
        "message",
        "text",
        "refusal",
        "output_text",
        "function_call",
        "custom_tool_call_output",
        "reasoning",
        "error",
        "response.completed",
        "response.output_text.delta",
        "thread.run",
        "thread.message",
        "id_1",
    ],
    keys: &[
        "id", "type", "status", "role", "content", "text", "value", "delta", "index", "response",
        "output", "error", "code", "message", "usage", "data", "call_id", "has_more", "object",
        "refusal",
    ],
};

/// Generates one of `real` with some of its values replaced or left out.
pub(super) fn mutated(real: Vec<Value>) -> impl Strategy<Value = Value> {
    testing::mutated(real, WORDS)
}

/// Generates `bytes` in pieces, with some bytes replaced, left out or repeated.
pub(super) fn damaged(bytes: Vec<u8>) -> impl Strategy<Value = Vec<Vec<u8>>> {
    (testing::damaged(bytes), 1_usize..200)
        .prop_map(|(bytes, piece)| bytes.chunks(piece).map(<[u8]>::to_vec).collect())
}

/// Returns what `decoder` makes of a stream of these bytes, as text, with the error at its end.
pub(super) fn read_to_the_end(
    pieces: Vec<Vec<u8>>,
    decoder: impl Decoder,
    limit: usize,
) -> Vec<String> {
    let bytes = stream::iter(pieces.into_iter().map(|piece| Ok(Bytes::from(piece))));
    let read = async {
        match relay_within(events(bytes, limit), decoder, limit, None).await {
            Ok(events) => events.map(|event| format!("{event:?}")).collect().await,
            Err(refusal) => vec![format!("{refusal:?}")],
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(read)
}

/// Counts the bytes of text in events.
pub(super) fn told<'a>(events: impl IntoIterator<Item = &'a UpstreamEvent>) -> usize {
    let told = |event: &UpstreamEvent| match event {
        UpstreamEvent::Accepted(_) => 0,
        UpstreamEvent::Text(delta) => delta.text.len(),
        UpstreamEvent::Ended(ended) => ended.content.iter().map(ContentPart::size).sum(),
    };
    events.into_iter().map(told).sum()
}

/// Checks that the result of [`read_to_the_end`] has one end, and no text or acceptance after it.
pub(super) fn ends_once(read: &[String]) -> Result<(), TestCaseError> {
    let is_end = |event: &&String| {
        ["Ok(Ended", "Err(", "Rejection"]
            .iter()
            .any(|end| event.starts_with(end))
    };
    prop_assert_eq!(read.iter().filter(is_end).count(), 1, "{:?}", read);
    let last = read.last().map(String::as_str).unwrap_or_default();
    prop_assert!(
        !last.starts_with("Ok(Text") && !last.starts_with("Ok(Accepted"),
        "{}",
        last
    );
    Ok(())
}
