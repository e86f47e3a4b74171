//! Pages of lists: which rows a page needs, and when it is full.

use sqlx::FromRow;

use super::errors::StoreError;
use super::rows::MessageRow;
use crate::domain::{ContentPart, Message, Page, PageRequest};

/// The most bytes of content that one page of a transcript reads, plus the rest of the message
/// that reaches them: 4 MiB. A message may have several MiB, and a page stays in memory until its
/// reader has taken it.
pub const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// The rows of a list that a page needs: those between two exclusive bounds, read from one end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Span {
    pub(super) above: i64,
    pub(super) below: i64,
    /// Whether to fetch from the low end.
    pub(super) upwards: bool,
    /// Whether the rows are fetched in the opposite of the requested order.
    reverse: bool,
    /// The number of rows to fetch: one more than the page holds shows whether more follow.
    pub(super) fetch: i64,
}

impl Span {
    /// Returns the span of a page. `cursor` is the number of the row that the request's `after` or
    /// `before` names.
    pub(super) fn new<Id>(page: &PageRequest<Id>, cursor: Option<i64>) -> Self {
        let backwards = page.after.is_none() && page.before.is_some();
        let upwards = page.ascending != backwards;
        Self {
            above: cursor.filter(|_| upwards).unwrap_or(0),
            below: cursor.filter(|_| !upwards).unwrap_or(i64::MAX),
            upwards,
            reverse: backwards,
            fetch: i64::from(page.limit) + 1,
        }
    }

    /// Returns the span above a number, from the high end or from below another number.
    pub(super) fn down(above: i64, before: Option<i64>, limit: u32) -> Self {
        let below = before.unwrap_or(i64::MAX);
        Self {
            above,
            below,
            upwards: false,
            reverse: false,
            fetch: i64::from(limit) + 1,
        }
    }

    /// Returns the part of the span behind this number, in the direction of reading.
    pub(super) fn behind(self, number: i64) -> Self {
        if self.upwards {
            Self {
                above: number,
                ..self
            }
        } else {
            Self {
                below: number,
                ..self
            }
        }
    }

    /// Makes a page of the fetched rows.
    pub(super) fn page<Row, T>(self, rows: Vec<Row>) -> Result<Page<T>, StoreError>
    where
        T: TryFrom<Row, Error = StoreError>,
    {
        let limit = usize::try_from(self.fetch - 1).unwrap_or(0);
        let has_more = rows.len() > limit;
        let mut data = rows
            .into_iter()
            .take(limit)
            .map(T::try_from)
            .collect::<Result<Vec<_>, _>>()?;
        if self.reverse {
            data.reverse();
        }
        Ok(Page { data, has_more })
    }
}

/// Returns the number of the row that a cursor names. Fails if the request has a cursor and it
/// names no row.
pub(super) fn cursor<Id: Copy>(
    page: &PageRequest<Id>,
    found: Option<i64>,
) -> Result<Option<i64>, StoreError> {
    match (page.after.or(page.before), found) {
        (Some(_), None) => Err(StoreError::UnknownCursor),
        (_, found) => Ok(found),
    }
}

/// A message in one step of a list.
#[derive(FromRow)]
pub(super) struct ListedRow {
    #[sqlx(flatten)]
    message: MessageRow,
    /// The number of messages for the step. The step returns fewer if they have many bytes.
    found: i64,
}

/// Collects messages step by step, until there are enough by number or by bytes.
pub(super) struct Filling {
    limit: usize,
    messages: Vec<Message>,
    bytes: usize,
    has_more: bool,
}

impl Filling {
    pub(super) fn new(limit: u32) -> Self {
        Self {
            limit: limit as usize,
            messages: Vec::new(),
            bytes: 0,
            has_more: true,
        }
    }

    /// Returns how many messages the next step may read, or `None` if no step is needed.
    pub(super) fn room(&self) -> Option<i64> {
        let room = self.limit - self.messages.len();
        (self.has_more && self.bytes < PAGE_BYTES && room > 0)
            .then(|| i64::try_from(room).unwrap_or(i64::MAX))
    }

    /// Adds the messages of a step. Returns the last one, behind which the next step begins.
    pub(super) fn add(&mut self, rows: Vec<ListedRow>) -> Result<Option<&Message>, StoreError> {
        let found = rows.first().map_or(0, |row| row.found);
        self.has_more = i64::try_from(rows.len()).is_ok_and(|taken| taken < found);
        for row in rows {
            // A step counts stored bytes, which may have been compressed.
            if self.bytes >= PAGE_BYTES {
                self.has_more = true;
                break;
            }
            let message = Message::try_from(row.message)?;
            self.bytes += message.content.iter().map(ContentPart::size).sum::<usize>();
            self.messages.push(message);
        }
        Ok(self.messages.last())
    }

    pub(super) fn messages(self) -> Vec<Message> {
        self.messages
    }

    /// Returns the page of messages that were read from the low end.
    pub(super) fn upwards(self) -> Page<Message> {
        Page {
            data: self.messages,
            has_more: self.has_more,
        }
    }

    /// Returns the page for a request with that span.
    pub(super) fn page(self, span: Span) -> Page<Message> {
        let Self {
            messages: mut data,
            has_more,
            ..
        } = self;
        if span.reverse {
            data.reverse();
        }
        Page { data, has_more }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(ascending: bool, after: Option<u8>, before: Option<u8>) -> PageRequest<u8> {
        PageRequest {
            limit: 2,
            ascending,
            after,
            before,
        }
    }

    struct Number(i64);
    impl TryFrom<i64> for Number {
        type Error = StoreError;
        fn try_from(n: i64) -> Result<Self, StoreError> {
            Ok(Self(n))
        }
    }

    #[test]
    fn a_span_takes_the_rows_next_to_the_cursor_in_the_chosen_order() {
        for (ascending, after, before, data, has_more) in [
            (true, None, None, [1, 2], true),
            (false, None, None, [5, 4], true),
            (true, Some(3), None, [4, 5], false),
            (true, None, Some(4), [2, 3], true),
            (true, None, Some(3), [1, 2], false),
            (false, Some(3), None, [2, 1], false),
            (false, None, Some(2), [4, 3], true),
        ] {
            let page = request(ascending, after, before);
            let span = Span::new(&page, after.or(before).map(i64::from));
            let mut rows: Vec<i64> = (1..=5)
                .filter(|n| span.above < *n && *n < span.below)
                .collect();
            if !span.upwards {
                rows.reverse();
            }
            rows.truncate(usize::try_from(span.fetch).unwrap());
            let got: Page<Number> = span.page(rows).unwrap();
            assert_eq!(
                got.data.iter().map(|n| n.0).collect::<Vec<_>>(),
                data,
                "{page:?}"
            );
            assert_eq!(got.has_more, has_more, "{page:?}");
        }
    }
}
