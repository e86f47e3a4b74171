#![expect(
    clippy::unwrap_used,
    reason = "a test may panic, and the lint does not see that helpers belong to tests"
)]

mod upstream;
