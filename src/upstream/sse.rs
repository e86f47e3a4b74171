//! An incremental decoder of server-sent events, with a limit on the size of one event.
//!
//! Line endings may be LF, CRLF or CR, chunks may be cut anywhere, and a byte order mark may come
//! first. Comments and blocks without data are skipped. A block that the end of the stream cuts
//! off is dropped. Some servers write JSON without a field name; it is read as data, each object as
//! an event.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Buf, Bytes};
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt, stream};
use serde_json::value::RawValue;
use sse_stream::SseByteStream;

use crate::upstream::error::UpstreamError;
use crate::upstream::memory_limit::is_dense;

/// One event that has data.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct SseEvent {
    /// The `event:` line, if there was one.
    pub(super) name: Option<String>,
    /// The `data:` lines, joined with LF.
    pub(super) data: String,
}

/// Decodes `bytes`. Ends after the first error.
///
/// # Errors
///
/// The errors of `bytes`. [`UpstreamError::Protocol`] for invalid UTF-8, for JSON with too many
/// values, or for more than `limit` bytes since the last event, comments included.
pub(super) fn events<S>(
    bytes: S,
    limit: usize,
) -> BoxStream<'static, Result<SseEvent, UpstreamError>>
where
    S: Stream<Item = Result<Bytes, UpstreamError>> + Send + 'static,
{
    let since_event = Arc::new(AtomicUsize::new(0));
    let counted = named(bytes).scan(Arc::clone(&since_event), move |seen, chunk| {
        // The decoder asks for more only when it has used up its input, so all bytes so far
        // belong to one unfinished event.
        let over = seen.load(Ordering::Relaxed) > limit;
        let chunk = if over { Err(too_long(limit)) } else { chunk };
        let seen = Arc::clone(seen);
        async move { Some(chunk.map(|bytes| Counted { bytes, seen }).map_err(Carried)) }
    });
    let state = (SseByteStream::new(Box::pin(counted)), since_event);
    stream::try_unfold(state, move |(mut decoder, since_event)| async move {
        while let Some(block) = decoder.next().await {
            let block = block.map_err(unpack)?;
            if since_event.swap(0, Ordering::Relaxed) > limit {
                return Err(too_long(limit));
            }
            if let Some(data) = block.data {
                if is_dense(data.as_bytes()) {
                    return Err(UpstreamError::Protocol(
                        "an event has too many values".to_owned(),
                    ));
                }
                let event = SseEvent {
                    name: block.event,
                    data,
                };
                return Ok(Some((event, (decoder, since_event))));
            }
        }
        Ok(None)
    })
    .flat_map(|event| {
        stream::iter(match event {
            Ok(event) => documents(event).into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        })
    })
    .boxed()
}

/// Returns an event for each line of a block that has one JSON object a line.
fn documents(event: SseEvent) -> Vec<SseEvent> {
    if event.name.is_some() || !event.data.starts_with('{') || !event.data.contains("\n{") {
        return vec![event];
    }
    let lines = serde_json::Deserializer::from_str(&event.data).into_iter::<&RawValue>();
    match lines.collect::<Result<Vec<_>, _>>() {
        Ok(lines) => lines
            .into_iter()
            .map(|line| SseEvent {
                name: None,
                data: line.get().to_owned(),
            })
            .collect(),
        Err(_) => vec![event],
    }
}

/// Returns the bytes, with `data:` before the lines of bare JSON.
fn named<S>(bytes: S) -> impl Stream<Item = S::Item> + Send + 'static
where
    S: Stream<Item = Result<Bytes, UpstreamError>> + Send + 'static,
{
    let state = (Box::pin(bytes), Bare::default());
    stream::unfold(state, |(mut bytes, mut bare)| async move {
        let chunk = match bytes.next().await {
            Some(Ok(chunk)) => Ok(bare.named(chunk)),
            Some(Err(error)) => Err(error),
            // The end of the stream completes the JSON.
            None if std::mem::take(&mut bare.inside) => Ok(Bytes::from_static(b"\n\n")),
            None => return None,
        };
        Some((chunk, (bytes, bare)))
    })
}

/// Finds JSON in a stream that has no field name: a line that begins with a brace, and the lines
/// after it that continue it.
#[derive(Debug, Default)]
struct Bare {
    inside: bool,
    /// The previous byte.
    last: Option<u8>,
}

impl Bare {
    fn named(&mut self, chunk: Bytes) -> Bytes {
        let begins_line =
            |before: Option<u8>| before.is_none_or(|byte| matches!(byte, b'\n' | b'\r'));
        let before = |at: usize| at.checked_sub(1).map_or(self.last, |at| Some(chunk[at]));
        let begins = memchr::memchr_iter(b'{', &chunk).any(|at| begins_line(before(at)));
        if !begins && !self.inside {
            self.last = chunk.last().copied().or(self.last);
            return chunk;
        }
        let mut named = Vec::with_capacity(chunk.len() + 64);
        for &byte in &chunk {
            if begins_line(self.last) {
                match byte {
                    b'\n' if self.last == Some(b'\r') => {}
                    b'\n' | b'\r' => self.inside = false,
                    b'{' => self.inside = true,
                    b'}' | b'[' | b']' | b'"' | b' ' | b'\t' => {}
                    // Another field begins. Repeating the line ending adds the empty line that
                    // ends the event of the JSON.
                    _ if std::mem::take(&mut self.inside) => named.extend(self.last),
                    _ => {}
                }
                if self.inside && !matches!(byte, b'\n') {
                    named.extend_from_slice(b"data:");
                }
            }
            named.push(byte);
            self.last = Some(byte);
        }
        named.into()
    }
}

/// A chunk that counts the bytes that the decoder takes from it, so that the count is exact
/// wherever the chunks end.
struct Counted {
    bytes: Bytes,
    seen: Arc<AtomicUsize>,
}

impl Buf for Counted {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.seen.fetch_add(count, Ordering::Relaxed);
        self.bytes.advance(count);
    }
}

/// Carries the gateway's own error through the decoder.
#[derive(Debug, thiserror::Error)]
#[error("the byte stream failed")]
struct Carried(#[source] UpstreamError);

fn unpack(error: sse_stream::Error) -> UpstreamError {
    match error {
        sse_stream::Error::Body(inner) => match inner.downcast::<Carried>() {
            Ok(carried) => carried.0,
            Err(_) => UpstreamError::Broken { timeout: false },
        },
        _ => UpstreamError::Protocol("an event is not UTF-8".to_owned()),
    }
}

fn too_long(limit: usize) -> UpstreamError {
    UpstreamError::Protocol(format!("an event is longer than {limit} bytes"))
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    /// Decodes the chunks. Errors are returned as text.
    fn decode(chunks: Vec<Vec<u8>>, limit: usize) -> Vec<Result<SseEvent, String>> {
        let bytes = stream::iter(chunks.into_iter().map(|chunk| Ok(Bytes::from(chunk))));
        events(bytes, limit)
            .map(|event| event.map_err(|error| error.to_string()))
            .collect::<Vec<_>>()
            .now_or_never()
            .expect("the input is ready")
    }

    fn whole(text: &str) -> Vec<Result<SseEvent, String>> {
        decode(vec![text.as_bytes().to_vec()], 1024)
    }

    fn cut(bytes: &[u8], mut at: Vec<usize>) -> Vec<Vec<u8>> {
        at.sort_unstable();
        let mut chunks = Vec::new();
        let mut start = 0;
        for end in at
            .into_iter()
            .map(|end| end.min(bytes.len()))
            .chain([bytes.len()])
        {
            chunks.push(bytes[start..end].to_vec());
            start = end;
        }
        chunks
    }

    const TRANSCRIPT: &str = "\u{feff}: hello\n\nevent: a\ndata: {\"x\":\"é\"}\n\ndata:1\ndata: 2\n\n: ping\n\n\
                              event: lonely\n\nid: 7\nretry: 10\n\nunknown: 1\nevent: b\ndata\n\ndata: [DONE]\n\n\
                              data: cut off";

    fn expected() -> Vec<Result<SseEvent, String>> {
        [
            (Some("a"), "{\"x\":\"é\"}"),
            (None, "1\n2"),
            (Some("b"), ""),
            (None, "[DONE]"),
        ]
        .map(|(name, data)| {
            Ok(SseEvent {
                name: name.map(str::to_owned),
                data: data.to_owned(),
            })
        })
        .to_vec()
    }

    #[test]
    fn only_blocks_with_data_are_events() {
        assert_eq!(whole(TRANSCRIPT), expected());
    }

    #[test]
    fn every_single_cut_gives_the_same_events() {
        for at in 0..TRANSCRIPT.len() {
            assert_eq!(
                decode(cut(TRANSCRIPT.as_bytes(), vec![at]), 1024),
                expected(),
                "cut at {at}"
            );
        }
    }

    const BARE: &str = "event: a\ndata: 1\n\n{\"error\": {\n  \"x\": [\n{\n}\n]\n}}\n\n{\"y\":1}\ndata: [DONE]\n\n{\"z\":2}";

    fn bare() -> Vec<Result<SseEvent, String>> {
        [
            (Some("a"), "1"),
            (None, "{\"error\": {\n \"x\": [\n{\n}\n]\n}}"),
            (None, "{\"y\":1}"),
            (None, "[DONE]"),
            (None, "{\"z\":2}"),
        ]
        .map(|(name, data)| {
            Ok(SseEvent {
                name: name.map(str::to_owned),
                data: data.to_owned(),
            })
        })
        .to_vec()
    }

    #[test]
    fn json_without_a_name_is_data() {
        for at in 0..BARE.len() {
            assert_eq!(
                decode(cut(BARE.as_bytes(), vec![at]), 1024),
                bare(),
                "cut at {at}"
            );
        }
        assert_eq!(
            whole("{"),
            [Ok(SseEvent {
                name: None,
                data: "{".to_owned()
            })]
        );
        // A broken connection cuts the JSON off.
        let bytes = stream::iter([
            Ok(Bytes::from_static(b"{")),
            Err(UpstreamError::Broken { timeout: false }),
        ]);
        let all = events(bytes, 100)
            .collect::<Vec<_>>()
            .now_or_never()
            .unwrap();
        assert!(matches!(
            all[..],
            [Err(UpstreamError::Broken { timeout: false })]
        ));
    }

    #[test]
    fn an_event_at_the_limit_passes_and_one_byte_more_fails() {
        let text = "data: 12345\n\ndata: 12345\n\n";
        assert_eq!(decode(vec![text.as_bytes().to_vec()], 13).len(), 2);
        assert!(
            decode(vec![text.as_bytes().to_vec()], 13)
                .iter()
                .all(Result::is_ok)
        );
        let over = decode(vec![text.as_bytes().to_vec()], 12);
        assert_eq!(
            over[0],
            Err("the upstream's answer cannot be used: an event is longer than 12 bytes".into())
        );
    }

    #[test]
    fn an_event_without_end_is_not_read_to_its_end() {
        let pulled = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&pulled);
        let endless = stream::repeat_with(move || {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(Bytes::from_static(b"data: 0123456789"))
        });
        let first = events(endless, 1000)
            .into_future()
            .now_or_never()
            .unwrap()
            .0;
        assert!(matches!(first, Some(Err(UpstreamError::Protocol(_)))));
        assert!(pulled.load(Ordering::Relaxed) <= 65);
    }

    #[test]
    fn an_error_of_the_bytes_comes_through_and_ends_the_stream() {
        let bytes = stream::iter([
            Ok(Bytes::from_static(b"data: 1\n\ndata: 2")),
            Err(UpstreamError::Broken { timeout: true }),
            Ok(Bytes::from_static(b"\n\n")),
        ]);
        let all = events(bytes, 100)
            .collect::<Vec<_>>()
            .now_or_never()
            .unwrap();
        assert_eq!(all.len(), 2);
        assert!(matches!(
            all[1],
            Err(UpstreamError::Broken { timeout: true })
        ));
    }

    #[test]
    fn invalid_utf8_is_an_error() {
        let all = decode(vec![b"data: \xff\n\ndata: 1\n\n".to_vec()], 100);
        assert_eq!(
            all,
            [Err(
                "the upstream's answer cannot be used: an event is not UTF-8".into()
            )]
        );
    }

    proptest! {
        #[test]
        fn cuts_and_line_endings_change_nothing(
            cuts in proptest::collection::vec(0_usize..200, 0..20),
            ending in prop_oneof![Just("\n"), Just("\r\n"), Just("\r")],
        ) {
            for (text, expected) in [(TRANSCRIPT, expected()), (BARE, bare())] {
                let text = text.replace('\n', ending);
                prop_assert_eq!(decode(cut(text.as_bytes(), cuts.clone()), 1024), expected);
            }
        }

        #[test]
        fn the_limit_does_not_depend_on_the_cuts(
            lengths in proptest::collection::vec(0_usize..40, 1..8),
            cuts in proptest::collection::vec(0_usize..300, 0..20),
            limit in 1_usize..50,
        ) {
            let text: String = lengths.iter().map(|n| ["data: ", &"x".repeat(*n), "\n\n"].concat()).collect();
            let events = decode(cut(text.as_bytes(), cuts), limit);
            let fitting = lengths.iter().take_while(|n| **n + 8 <= limit).count();
            prop_assert!(events.len() > fitting || fitting == lengths.len());
            prop_assert_eq!(events.iter().take_while(|event| event.is_ok()).count(), fitting);
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(
            bytes in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'\n'), Just(b'\r'), Just(b':')], 0..300),
            cuts in proptest::collection::vec(0_usize..300, 0..10),
        ) {
            let events = decode(cut(&bytes, cuts), 100);
            prop_assert!(events.iter().rev().skip(1).all(Result::is_ok), "an error is the last item");
        }
    }
}
