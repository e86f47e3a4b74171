//! Retries of store calls during a run. The caller bounds their time.

use std::time::Duration;

use tokio::time::sleep;

use super::failure::Failure;
use crate::error::Chain;
use crate::runs::backoff::jittered;
use crate::store::StoreError;

/// Pause after the database was unavailable.
const PAUSE: Duration = Duration::from_millis(500);

/// Writes about a run of this process, and retries while the database is unavailable.
///
/// # Errors
/// The run is no longer this process's, or the database refused the write.
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

/// Asks the store, and retries while the database is unavailable.
///
/// # Errors
/// The database refused the query.
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

/// Waits before the next try.
///
/// # Errors
/// The database refused the call, so another try would not help.
pub(in crate::runs) async fn back_off(error: StoreError) -> Result<(), Failure> {
    tracing::error!(error = %Chain(&error), "a store call failed during a run");
    if !matches!(error, StoreError::Unavailable(_)) {
        return Err(Failure::Store);
    }
    sleep(jittered(PAUSE)).await;
    Ok(())
}
