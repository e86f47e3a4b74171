//! Finds threads and conversations by their tags.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::domain::{ThreadId, UpstreamThreadId};
use crate::upstream::error::UpstreamError;
use crate::upstream::retrying_client::{RetryingClient, is_not_offered};
use crate::upstream::tags::THREAD_TAG;
use crate::upstream::wire::lenient;

/// Pages that are searched, newest threads first.
const MAX_PAGES: usize = 50;
/// Threads that may be found for one thread. The gateway never creates that many, so a server
/// that lists more ignores the tags.
const MAX_FOUND: usize = 100;
/// Bytes of an id. No server has longer ids.
const MAX_ID_BYTES: usize = 512;

#[derive(Debug, Deserialize)]
struct Listed {
    id: String,
    #[serde(default, deserialize_with = "lenient")]
    metadata: Option<Map<String, Value>>,
}

/// Returns the threads in the list at `path` that were created for `of`. Returns `None` if there
/// is no such list, or if the searched pages of a longer list have none.
pub(super) async fn find(
    calls: RetryingClient<'_>,
    path: &str,
    of: ThreadId,
) -> Result<Option<Vec<UpstreamThreadId>>, UpstreamError> {
    let of = of.to_string();
    let mut found = Vec::new();
    let mut after: Option<String> = None;
    for _ in 0..MAX_PAGES {
        let page = match calls
            .page::<Listed>(&[path], "desc", after.as_deref())
            .await
        {
            Ok(page) => page,
            Err(error) if is_not_for_us(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let last = page.next(|listed| &listed.id);
        // A server that ignores the cursor returns the same page for ever.
        if last.is_some() && last == after {
            return Ok(Some(found));
        }
        let is_of = |listed: &Listed| {
            listed
                .metadata
                .as_ref()
                .and_then(|tags| tags.get(THREAD_TAG)?.as_str())
                == Some(&of)
        };
        let of_it = page.data.into_iter().filter(is_of).map(|listed| listed.id);
        found.extend(
            of_it
                .filter(|id| id.len() <= MAX_ID_BYTES)
                .take(MAX_FOUND)
                .map(UpstreamThreadId),
        );
        if found.len() > MAX_FOUND {
            return Err(UpstreamError::Protocol(
                "the server lists too many threads with the same tag".to_owned(),
            ));
        }
        if last.is_none() {
            return Ok(Some(found));
        }
        after = last;
    }
    tracing::warn!(
        "the upstream lists too many threads, so only the newest were searched by their tags"
    );
    Ok(Some(found).filter(|found| !found.is_empty()))
}

/// Returns true if the list does not exist, or if the API key may not read it.
fn is_not_for_us(error: &UpstreamError) -> bool {
    match error {
        UpstreamError::Refused {
            code: Some(code), ..
        } if code == "missing_scope" => true,
        UpstreamError::Refused { status: 403, .. } => true,
        error => is_not_offered(error),
    }
}
