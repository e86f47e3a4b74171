//! Asking the store in the middle of a run until it answers. The caller bounds that in time.

use std::time::Duration;

use tokio::time::sleep;

use super::failure::Failure;
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::store::StoreError;

/// The pause after the database was away.
const PAUSE: Duration = Duration::from_millis(500);

/// Writes something of a run that this process has, however long the database is away.
///
/// # Errors
/// The run is not this process's any more, or the database refused.
pub(in crate::runs) async fn write_until_ok<F>(write: impl Fn() -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<bool, StoreError>>,
{
    if retry_until_ok(write).await? {
        Ok(())
    } else {
        Err(Failure::LeaseLost)
    }
}

/// Asks the store until it answers.
///
/// # Errors
/// The database refused.
pub(in crate::runs) async fn retry_until_ok<T, F>(ask: impl Fn() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, StoreError>>,
{
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => back_off(error).await?,
        }
    }
}

/// Pauses before another try.
///
/// # Errors
/// The database refused, so another try would not help.
pub(in crate::runs) async fn back_off(error: StoreError) -> Result<(), Failure> {
    tracing::error!(error = %Chain(&error), "the store failed in the middle of a turn");
    if !matches!(error, StoreError::Unavailable(_)) {
        return Err(Failure::Store);
    }
    sleep(jittered(PAUSE)).await;
    Ok(())
}
