//! Closes a connection whose client may still be sending.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// Bytes that are read and dropped after the last answer: more than a body of the default limit.
pub const LINGER_BYTES: usize = 16 * 1024 * 1024;
/// Silence of a client that has its last answer and does not close.
pub const LINGER_SILENCE: Duration = Duration::from_secs(2);
/// Time for the whole rest of a body, over a slow link.
pub const LINGER_TIME: Duration = Duration::from_secs(30);

/// Bytes of one read.
const CHUNK: usize = 16 * 1024;

/// Shuts the sending side down, then reads and drops bytes until the client closes or falls silent, or a
/// limit is reached. The kernel resets a socket that is closed with unread bytes, and the reset can
/// overtake the answer. A client that sends its whole request before it reads would then see a broken
/// connection instead of a refusal.
pub(super) async fn linger<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let drained = async {
        // An error may mean that the stream is shut down already.
        drop(stream.shutdown().await);
        let mut chunk = vec![0; CHUNK];
        let mut read = 0;
        while read < LINGER_BYTES {
            match timeout(LINGER_SILENCE, stream.read(&mut chunk)).await {
                Ok(Ok(length)) if length > 0 => read += length,
                _ => return,
            }
        }
    };
    // Every outcome leads to the close.
    drop(timeout(LINGER_TIME, drained).await);
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;
    use tokio::time::{Instant, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_closes_is_not_waited_for() {
        let (ours, mut theirs) = duplex(CHUNK);
        let start = Instant::now();
        let sends = async move {
            theirs.write_all(&vec![0; 10 * CHUNK]).await.unwrap();
            assert_eq!(
                theirs.read(&mut [0]).await.unwrap(),
                0,
                "our side is closed"
            );
        };
        tokio::join!(linger(ours), sends);
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_goes_silent_is_given_up() {
        let (ours, _theirs) = duplex(CHUNK);
        let start = Instant::now();
        linger(ours).await;
        assert_eq!(start.elapsed().as_secs(), LINGER_SILENCE.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_trickles_is_given_up() {
        let (ours, mut theirs) = duplex(CHUNK);
        let start = Instant::now();
        let trickles = async {
            while theirs.write_all(b"x").await.is_ok() {
                sleep(LINGER_SILENCE / 2).await;
            }
        };
        tokio::join!(linger(ours), trickles);
        let elapsed = start.elapsed();
        assert!(
            elapsed >= LINGER_TIME && elapsed < LINGER_TIME + LINGER_SILENCE,
            "{elapsed:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_stops_sends_a_bounded_rest() {
        let (ours, mut theirs) = duplex(CHUNK);
        let mut sent = 0;
        let sends = async {
            while theirs.write_all(&[0; CHUNK]).await.is_ok() {
                sent += CHUNK;
            }
        };
        tokio::join!(linger(ours), sends);
        assert!(
            (LINGER_BYTES..=LINGER_BYTES + 2 * CHUNK).contains(&sent),
            "{sent}"
        );
    }
}
