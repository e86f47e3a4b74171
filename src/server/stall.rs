//! A stream that fails if its peer reads nothing for too long.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// Fails a write, flush or shutdown that waits for the peer longer than the limit. A peer that keeps its
/// TCP window shut would otherwise hold the connection and its answer for ever. Reads have no limit here.
#[derive(Debug)]
pub(super) struct StallGuard<S> {
    stream: S,
    limit: Duration,
    /// Timer of the write that waits. The first such write creates it, and later ones reset it.
    deadline: Option<Pin<Box<Sleep>>>,
    /// Whether a write waits.
    waiting: Arc<AtomicBool>,
}

impl<S> StallGuard<S> {
    /// Wraps a stream. `waiting` is true while a write waits.
    pub(super) const fn new(stream: S, limit: Duration, waiting: Arc<AtomicBool>) -> Self {
        Self {
            stream,
            limit,
            deadline: None,
            waiting,
        }
    }

    /// Passes the stream's result on, unless the stream has been pending for longer than the limit.
    fn judge<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.waiting.store(false, Ordering::Release);
            return poll;
        }
        let limit = self.limit;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(limit)));
        if !self.waiting.swap(true, Ordering::AcqRel) {
            deadline.as_mut().reset(Instant::now() + limit);
        }
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client reads no bytes",
        )))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for StallGuard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for StallGuard<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.judge(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.judge(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(cx);
        self.judge(cx, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.judge(cx, poll)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_fails_the_write_on_time() {
        let (ours, _theirs) = duplex(4);
        let mut guarded = StallGuard::new(ours, LIMIT, Arc::default());
        let start = Instant::now();
        let error = guarded.write_all(b"more than four").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed().as_secs(), LIMIT.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_peer_has_the_full_time_for_each_write() {
        let (ours, mut theirs) = duplex(1);
        let mut guarded = StallGuard::new(ours, LIMIT, Arc::default());
        let writer = async move { guarded.write_all(b"slowly").await };
        let reader = async {
            let mut text = [0; 6];
            for byte in &mut text {
                sleep(LIMIT * 9 / 10).await;
                *byte = theirs.read_u8().await.unwrap();
            }
            text
        };
        let (written, text) = tokio::join!(writer, reader);
        written.unwrap();
        assert_eq!(&text, b"slowly");
    }

    #[tokio::test(start_paused = true)]
    async fn time_between_writes_does_not_count() {
        let (ours, _theirs) = duplex(16);
        let mut guarded = StallGuard::new(ours, LIMIT, Arc::default());
        guarded.write_all(b"a").await.unwrap();
        sleep(LIMIT * 3).await;
        guarded.write_all(b"b").await.unwrap();
    }
}
