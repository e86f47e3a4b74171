//! Reads request bodies within limits: size, speed, and the memory of all bodies together.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout, timeout_at};

use crate::config::ServerConfig;
use crate::error::Error;
use crate::locks::{Budget, Share};

/// Size of a body, in bytes, up to which it takes no share of `server.max_buffered_body_bytes`, so that
/// ordinary messages do not wait behind pictures. A connection's own buffer has about this size.
pub(super) const SMALL: usize = 16 * 1024;
/// Longest wait for memory.
pub(super) const ROOM_WAIT: Duration = Duration::from_secs(5);

/// Reads a body to its end, within `server.max_body_bytes`, `body_read_timeout` and `min_body_rate`.
/// The caller must keep the share of the budget as long as the content of the body is in memory.
pub(super) async fn read(
    mut body: Body,
    server: &ServerConfig,
    budget: &Budget,
) -> Result<(Vec<u8>, Share), Error> {
    let limit = server.max_body_bytes;
    let declared = body
        .size_hint()
        .exact()
        .map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    // This check is before the first read, because the first read sends `100 Continue`.
    if declared.is_some_and(|bytes| bytes > limit) {
        return Err(Error::PayloadTooLarge { limit });
    }
    let declared = declared.unwrap_or_default();
    let mut share = if declared > SMALL {
        room(budget, declared).await?
    } else {
        Share::default()
    };
    let mut read = Vec::with_capacity(declared);
    let mut begun = Instant::now();
    loop {
        let silence = Instant::now() + server.body_read_timeout;
        let due = begun + server.body_read_timeout + time_of(read.len(), server.min_body_rate);
        let frame = timeout_at(silence.min(due), body.frame())
            .await
            .map_err(|_| Error::BodyTimeout)?;
        let Some(frame) = frame else { break };
        let frame =
            frame.map_err(|_| Error::Malformed("the body broke off: send it again".to_owned()))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        let bytes = read.len() + data.len();
        if bytes > limit {
            return Err(Error::PayloadTooLarge { limit });
        }
        if share.is_none() && bytes > SMALL {
            let waits = Instant::now();
            share = room(budget, limit).await?;
            begun += waits.elapsed();
        }
        read.extend_from_slice(&data);
    }
    share.shrink(read.len());
    replace_lone_surrogates(&mut read);
    Ok((read, share))
}

/// Replaces each escape of half a UTF-16 pair in a JSON text, such as `\ud83d` without its other
/// half, by that of U+FFFD. A program that cuts texts by UTF-16 units writes such halves, and no
/// Rust text can hold them. The length stays.
fn replace_lone_surrogates(json: &mut [u8]) {
    const ESCAPE: usize = r"\uXXXX".len();
    let unit = |json: &[u8]| match json {
        [b'\\', b'u', digits @ ..] => {
            let digits = std::str::from_utf8(digits.get(..4)?).ok()?;
            u16::from_str_radix(digits, 16).ok()
        }
        _ => None,
    };
    let mut at = 0;
    while let Some(next) = json[at..].iter().position(|byte| *byte == b'\\') {
        at += next;
        at += match unit(&json[at..]) {
            Some(0xd800..=0xdbff)
                if matches!(unit(&json[at + ESCAPE..]), Some(0xdc00..=0xdfff)) =>
            {
                2 * ESCAPE
            }
            Some(0xd800..=0xdfff) => {
                json[at..at + ESCAPE].copy_from_slice(br"\ufffd");
                ESCAPE
            }
            Some(_) => ESCAPE,
            None => 2.min(json.len() - at),
        };
    }
}

async fn room(budget: &Budget, bytes: usize) -> Result<Share, Error> {
    timeout(ROOM_WAIT, budget.take(bytes))
        .await
        .map_err(|_| Error::BodiesFull)
}

/// Returns the longest time that this number of bytes may take at this rate, in bytes a second.
fn time_of(bytes: usize, rate: u32) -> Duration {
    if rate == 0 {
        // No limit.
        return Duration::from_hours(24 * 365);
    }
    Duration::from_millis(
        u64::try_from(bytes)
            .unwrap_or(u64::MAX)
            .saturating_mul(1000)
            / u64::from(rate),
    )
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use futures_util::stream;
    use tokio::time::sleep;

    use super::*;

    /// Reads a body of `pieces` pieces of `bytes` bytes, each after a pause. Returns the result and the time.
    async fn sent(
        bytes: usize,
        pause: Duration,
        pieces: usize,
    ) -> (Result<usize, Error>, Duration) {
        let server = ServerConfig::default();
        let budget = Budget::new(server.max_buffered_body_bytes);
        let piece = Bytes::from(vec![b'x'; bytes]);
        let pieces = stream::unfold(0, move |sent| {
            let piece = piece.clone();
            async move {
                sleep(pause).await;
                (sent < pieces).then_some((Ok::<_, Infallible>(piece), sent + 1))
            }
        });
        let start = Instant::now();
        let read = read(Body::from_stream(pieces), &server, &budget).await;
        (read.map(|(read, _)| read.len()), start.elapsed())
    }

    #[test]
    fn half_a_pair_becomes_the_replacement_character() {
        for (sent, taken) in [
            (r#""cut off \ud83d""#, "cut off \u{fffd}"),
            (r#""\ude00!""#, "\u{fffd}!"),
            (r#""\ud83d\ud83d\ude00\n""#, "\u{fffd}\u{1f600}\n"),
            (r#""\uD83D\u0041\\ud83d""#, "\u{fffd}A\\ud83d"),
            (r#""\\\ud83d""#, "\\\u{fffd}"),
        ] {
            let mut json = sent.as_bytes().to_vec();
            replace_lone_surrogates(&mut json);
            assert_eq!(
                serde_json::from_slice::<String>(&json).unwrap(),
                taken,
                "{sent}"
            );
        }
        for broken in [r"\", r"\u", r"\ud83", r"\ud83d\", r"\u+123", r"\ud83d\u"] {
            let mut json = broken.as_bytes().to_vec();
            replace_lone_surrogates(&mut json);
            assert_eq!(json.len(), broken.len());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_largest_body_passes_over_a_slow_link() {
        let (read, took) = sent(64 * 1024, Duration::from_secs(1), 192).await;
        assert_eq!(read.unwrap(), ServerConfig::default().max_body_bytes);
        assert!(took > Duration::from_mins(3), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_trickle_is_given_up() {
        for (bytes, pause) in [
            (1, Duration::from_secs(3)),
            (8 * 1024, Duration::from_secs(1)),
        ] {
            let (read, took) = sent(bytes, pause, usize::MAX).await;
            assert!(matches!(read, Err(Error::BodyTimeout)), "{read:?}");
            assert!(took < Duration::from_mins(2), "{took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_given_up() {
        let limit = ServerConfig::default().body_read_timeout;
        let (read, took) = sent(64 * 1024, limit + Duration::from_secs(1), 2).await;
        assert!(matches!(read, Err(Error::BodyTimeout)), "{read:?}");
        assert!(
            took >= limit && took < limit + Duration::from_secs(1),
            "{took:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_body_waits_for_room_and_a_small_one_does_not() {
        let server = ServerConfig::default();
        let budget = Budget::new(1024 * 1024);
        let all = budget.take(1024 * 1024).await;
        let (small, _) = read(Body::from(vec![0; SMALL]), &server, &budget)
            .await
            .unwrap();
        assert_eq!(small.len(), SMALL);
        let start = Instant::now();
        let refused = read(Body::from(vec![0; SMALL + 1]), &server, &budget).await;
        assert!(matches!(refused, Err(Error::BodiesFull)));
        assert_eq!(start.elapsed().as_secs(), ROOM_WAIT.as_secs());
        drop(all);
        let (large, share) = read(Body::from(vec![0; SMALL + 1]), &server, &budget)
            .await
            .unwrap();
        assert!(large.len() == SMALL + 1 && !share.is_none());
    }
}
