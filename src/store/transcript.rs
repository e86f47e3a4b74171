//! Reading transcripts, page by page.

use uuid::Uuid;

use super::engine::Engine;
use super::paging::{Filling, ListedRow, PAGE_BYTES, Span, cursor};
use super::params::params;
use super::pool::Connection;
use super::statement::Statement;
use super::threads::{BY_ID, BY_KEY, by_name, of_tenant};
use super::{Store, StoreError, ThreadName};
use crate::domain::{ConversationKey, Message, MessageId, Page, PageRequest, ThreadId};

/// Finds a thread, and the position in it of the message that a cursor names. NULL if that message
/// is not in the thread.
const FIND_CURSOR: &str = "
    SELECT t.id, (
        SELECT CASE WHEN m.thread_id = t.id THEN m.position END FROM messages m WHERE m.id = :cursor
    )
    FROM threads t
    WHERE {0}";

static FIND_CURSOR_BY_KEY: Statement =
    Statement::variant("transcript.find_cursor_by_key", FIND_CURSOR, BY_KEY);
static FIND_CURSOR_BY_ID: Statement =
    Statement::variant("transcript.find_cursor_by_id", FIND_CURSOR, BY_ID);

/// Gives a row if the key has a thread: the thread and the position of the message that a cursor
/// names.
static FIND_CURSOR_ACROSS: Statement = Statement::new(
    "transcript.find_cursor_across",
    "SELECT m.thread_id, m.position
    FROM threads t
    LEFT JOIN messages m ON m.id = :cursor
        AND EXISTS (SELECT 1 FROM threads t WHERE t.id = m.thread_id AND {lasting_of_key})
    WHERE {lasting_of_key}
    LIMIT 1",
);

/// Lists the messages of a thread between two positions.
const LIST: &str = "
    {listed m_position {0}, FROM messages m
        WHERE m.thread_id = :of AND m.position > :above AND m.position < :below
        ORDER BY m.position {0}}";

static LIST_UPWARDS: Statement = Statement::variant("transcript.list_upwards", LIST, &["ASC"]);
static LIST_DOWNWARDS: Statement = Statement::variant("transcript.list_downwards", LIST, &["DESC"]);

/// Lists the messages of a thread between two positions, newest first, without withheld ones.
pub(super) static DOWNWARDS_KNOWN: Statement = Statement::new(
    "transcript.list_known",
    "{listed m_position DESC, FROM messages m
        WHERE m.thread_id = :of AND m.position > :above AND m.position < :below
            AND m.upstream_sync <> 'withheld'
        ORDER BY m.position DESC}",
);

/// Lists the messages of all threads of a key behind a position of one of them. It reads at most
/// `:limit` + 1 of each thread: a sort over all messages would read whole transcripts.
const LIST_ACROSS: &str = "
    {listed m_thread_id {0} then m_position {0}, FROM threads t
        {lateral messages m, FROM messages f
            WHERE f.thread_id = t.id AND f.position {1} CASE WHEN t.id = :thread THEN :position ELSE {2} END
            ORDER BY f.position {0}
            LIMIT :limit + 1}
        WHERE {lasting_of_key} AND t.id {1}= :thread
        ORDER BY t.id {0}, m.position {0}}";

static LIST_ACROSS_UPWARDS: Statement = Statement::variant(
    "transcript.list_across_upwards",
    LIST_ACROSS,
    &["ASC", ">", "0"],
);
static LIST_ACROSS_DOWNWARDS: Statement = Statement::variant(
    "transcript.list_across_downwards",
    LIST_ACROSS,
    &["DESC", "<", "9223372036854775807"],
);

/// Lists the messages of some threads, from behind the position `:position` of the thread
/// `:thread`. Threads before that one are skipped.
static LIST_OF_THREADS: Statement = Statement::new(
    "transcript.list_of_threads",
    "{listed m_thread_id ASC then m_position ASC, FROM threads t
        {lateral messages m, FROM messages f
            WHERE f.thread_id = t.id AND f.position > CASE WHEN t.id = :thread THEN :position ELSE 0 END
            ORDER BY f.position
            LIMIT :limit + 1}
        WHERE t.id {in :threads} AND t.id >= :thread
        ORDER BY t.id ASC, m.position ASC}",
);

pub(super) static STATEMENTS: &[&Statement] = &[
    &FIND_CURSOR_BY_KEY,
    &FIND_CURSOR_BY_ID,
    &FIND_CURSOR_ACROSS,
    &LIST_UPWARDS,
    &LIST_DOWNWARDS,
    &DOWNWARDS_KNOWN,
    &LIST_ACROSS_UPWARDS,
    &LIST_ACROSS_DOWNWARDS,
    &LIST_OF_THREADS,
];

impl Store {
    /// Returns a page of a transcript by position; `None` if there is no such thread. `across`: of
    /// all threads that the key has and had, the oldest thread first, without those that are being
    /// deleted. The page ends before its limit, with `has_more`, once it holds [`PAGE_BYTES`].
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`] if `after` or `before` names no message of the transcript.
    pub async fn messages(
        &self,
        name: ThreadName<'_>,
        across: bool,
        page: &PageRequest<MessageId>,
    ) -> Result<Option<Page<Message>>, StoreError> {
        let mut c = self.backend.reader().await?;
        if across {
            return match name {
                ThreadName::Newest(key) => messages_across(&mut c, key, page).await,
                ThreadName::Id(tenant, id) => match of_tenant(&mut c, tenant, id).await? {
                    Some(thread) => messages_across(&mut c, &thread.key, page).await,
                    None => Ok(None),
                },
            };
        }
        let (statement, values) = by_name(name, &FIND_CURSOR_BY_KEY, &FIND_CURSOR_BY_ID);
        let found: Option<(Uuid, Option<i64>)> = c
            .optional(statement, values.set("cursor", named(page)))
            .await?;
        let Some((thread, position)) = found else {
            return Ok(None);
        };
        let span = Span::new(page, cursor(page, position)?);
        let statement = if span.upwards {
            &LIST_UPWARDS
        } else {
            &LIST_DOWNWARDS
        };
        Ok(Some(
            listed(&mut c, statement, thread, span, page.limit)
                .await?
                .page(span),
        ))
    }

    /// Returns up to `limit` messages of any thread after a position (0: from the first on),
    /// oldest first. It returns fewer, but at least one, if they hold [`PAGE_BYTES`]. The result
    /// is empty only if there are no more messages.
    pub async fn transcript(
        &self,
        thread: ThreadId,
        after: i64,
        limit: u32,
    ) -> Result<Vec<Message>, StoreError> {
        let mut c = self.backend.reader().await?;
        let all = PageRequest::<MessageId> {
            limit,
            ascending: true,
            after: None,
            before: None,
        };
        let span = Span::new(&all, None).behind(after);
        Ok(listed(&mut c, &LIST_UPWARDS, thread.uuid(), span, limit)
            .await?
            .messages())
    }

    /// Returns a page of the messages of some threads: by thread id, and within a thread oldest
    /// first. `behind`: the thread and the position behind which the page begins. Threads with
    /// lower ids are skipped.
    pub async fn transcripts(
        &self,
        threads: &[ThreadId],
        behind: (ThreadId, i64),
        limit: u32,
    ) -> Result<Page<Message>, StoreError> {
        let mut c = self.backend.reader().await?;
        let (mut thread, mut position) = (behind.0.uuid(), behind.1);
        let mut filling = Filling::new(limit);
        while let Some(room) = filling.room() {
            let values = params()
                .set(
                    "threads",
                    threads.iter().map(|id| id.uuid()).collect::<Vec<_>>(),
                )
                .set("thread", thread)
                .set("position", position)
                .set("limit", room)
                .set("bytes", step_bytes(c.engine()));
            let rows: Vec<ListedRow> = c.all(&LIST_OF_THREADS, values).await?;
            if let Some(last) = filling.add(rows)? {
                (thread, position) = (last.thread_id.uuid(), last.position);
            }
        }
        Ok(filling.upwards())
    }
}

/// Reads up to `limit` messages, in the direction of a statement. `of`: the id of a thread or run,
/// which tells the statement what to list. The statement's other parameters are `above`, `below`,
/// and those of the word `listed`.
pub(super) async fn listed(
    c: &mut Connection,
    statement: &'static Statement,
    of: Uuid,
    mut span: Span,
    limit: u32,
) -> Result<Filling, StoreError> {
    let mut filling = Filling::new(limit);
    while let Some(room) = filling.room() {
        let values = params()
            .set("of", of)
            .set("above", span.above)
            .set("below", span.below)
            .set("limit", room)
            .set("bytes", step_bytes(c.engine()));
        let rows: Vec<ListedRow> = c.all(statement, values).await?;
        if let Some(last) = filling.add(rows)? {
            span = span.behind(last.position);
        }
    }
    Ok(filling)
}

/// The part of [`Store::messages`] that reads all threads of a key.
async fn messages_across(
    c: &mut Connection,
    key: &ConversationKey,
    page: &PageRequest<MessageId>,
) -> Result<Option<Page<Message>>, StoreError> {
    let values = params().key(key).set("cursor", named(page));
    let found: Option<(Option<Uuid>, Option<i64>)> =
        c.optional(&FIND_CURSOR_ACROSS, values).await?;
    let Some((thread, position)) = found else {
        return Ok(None);
    };
    let span = Span::new(page, cursor(page, position)?);
    let (statement, first, bound) = if span.upwards {
        (&LIST_ACROSS_UPWARDS, Uuid::nil(), span.above)
    } else {
        (&LIST_ACROSS_DOWNWARDS, Uuid::max(), span.below)
    };
    let mut behind = (thread.unwrap_or(first), bound);
    let mut filling = Filling::new(page.limit);
    while let Some(room) = filling.room() {
        let values = params()
            .key(key)
            .set("thread", behind.0)
            .set("position", behind.1)
            .set("limit", room)
            .set("bytes", step_bytes(c.engine()));
        let rows: Vec<ListedRow> = c.all(statement, values).await?;
        if let Some(last) = filling.add(rows)? {
            behind = (last.thread_id.uuid(), last.position);
        }
    }
    Ok(Some(filling.page(span)))
}

/// Returns the id of the message that the cursor of a page names.
fn named(page: &PageRequest<MessageId>) -> Option<Uuid> {
    page.after.or(page.before).map(MessageId::uuid)
}

/// Returns the number of stored bytes after which one step of a list stops, at the end of a
/// message.
#[expect(clippy::cast_possible_wrap, reason = "a few MiB")]
const fn step_bytes(engine: Engine) -> i64 {
    match engine {
        // Compressed content may be a hundred times as long when it is read.
        Engine::Postgres => 128 * 1024,
        // Content is not compressed, so one step fills a page.
        Engine::Sqlite => PAGE_BYTES as i64,
    }
}
