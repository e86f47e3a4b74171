//! Reads a thread from its beginning.

use serde::de::DeserializeOwned;

use crate::upstream::error::UpstreamError;
use crate::upstream::port::{HistoryEntry, HistoryPage};
use crate::upstream::retrying_client::{RetryingClient, is_not_offered};

/// Returns a page of the list at `path` as history entries. Elements for which `entry` returns
/// `None` are left out. Returns `None` if the server has no such list.
pub(super) async fn history_page<T: DeserializeOwned>(
    client: RetryingClient<'_>,
    path: &[&str],
    after: Option<&str>,
    id: fn(&T) -> &str,
    entry: impl FnMut(T) -> Option<HistoryEntry>,
) -> Result<Option<HistoryPage>, UpstreamError> {
    let page = match client.page::<T>(path, "asc", after).await {
        Ok(page) => page,
        Err(error) if is_not_offered(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let next = page.next(id);
    Ok(Some(HistoryPage {
        entries: page.data.into_iter().filter_map(entry).collect(),
        next,
    }))
}
