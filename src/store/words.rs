//! The words that statements use besides SQL: `{now}`, `{ms :ttl}`, `{run r}`.
//!
//! There are two kinds: text that the engines spell differently, and conditions and columns that
//! many statements share. The arguments of a word may contain words, which are expanded first.

use super::engine::Engine;
use crate::domain::RunErrorCode;

/// Expands the words of a text, and removes its comments.
///
/// # Panics
/// If the text has an unknown word or an open brace. A test expands every statement.
pub(super) fn expand(engine: Engine, text: &str) -> String {
    let text = without_comments(text);
    let mut out = String::with_capacity(text.len());
    let mut rest = &*text;
    while let Some(open) = rest.find('{') {
        out.push_str(&rest[..open]);
        let inside = &rest[open + 1..];
        let close = closing(inside).unwrap_or_else(|| panic!("an open brace in {text}"));
        let (word, arguments) = inside[..close]
            .split_once(char::is_whitespace)
            .unwrap_or((&inside[..close], ""));
        let arguments = expand(engine, arguments.trim());
        out.push_str(&expand(engine, &meaning(engine, word, &arguments)));
        rest = &inside[close + 1..];
    }
    out.push_str(rest);
    out
}

/// Returns the position of the brace that closes the one before the text.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// Removes `-- …`, and lines with nothing else. No quoted text in a statement has two hyphens.
fn without_comments(text: &str) -> String {
    let lines = text
        .split('\n')
        .filter_map(|line| match line.split_once("--") {
            Some((code, _)) if code.trim().is_empty() => None,
            Some((code, _)) => Some(code.trim_end()),
            None => Some(line),
        });
    lines.collect::<Vec<_>>().join("\n")
}

/// Splits the two arguments of a word. The first one has no comma.
fn pair(arguments: &str) -> (&str, &str) {
    let (one, other) = arguments
        .split_once(',')
        .unwrap_or_else(|| panic!("a word that needs two arguments has one: {arguments}"));
    (one.trim(), other.trim())
}

/// Returns the text that a word stands for.
fn meaning(engine: Engine, word: &str, x: &str) -> String {
    match engine {
        Engine::Postgres => of_postgres(word, x),
        Engine::Sqlite => of_sqlite(word, x),
    }
    .or_else(|| of_both(word, x))
    .or_else(|| of_item(word, x))
    .unwrap_or_else(|| panic!("unknown word `{word}`"))
}

/// Returns the spelling of Postgres. The comments are in [`of_sqlite`].
fn of_postgres(word: &str, x: &str) -> Option<String> {
    Some(match word {
        "now" => "now()".to_owned(),
        "clock" => "clock_timestamp()".to_owned(),
        "ms" => format!("({x})::bigint * interval '1 millisecond'"),
        "ms_since" => format!("(EXTRACT(epoch FROM now() - {x}) * 1000)::bigint"),
        "ms_since_up" => {
            format!("ceil(EXTRACT(epoch FROM clock_timestamp() - {x}) * 1000)::bigint")
        }
        "ms_until" => format!("(EXTRACT(epoch FROM {x} - clock_timestamp()) * 1000)::bigint"),
        "at_ms" => format!("to_timestamp(({x})::bigint / 1000.0)"),
        "id_after" => format!(
            "(lpad(to_hex(GREATEST(0, (EXTRACT(epoch FROM now()) * 1000)::bigint - ({x}) + 1)), 12, '0') \
             || repeat('0', 20))::uuid"
        ),
        "hex" => format!("replace({x}::text, '-', '')"),
        "uuid" => format!("({x})::uuid"),
        "as" => {
            let (kind, value) = pair(x);
            format!("CAST({value} AS {kind})")
        }
        "text" => format!("{x}::text"),
        "in" => format!("= ANY ({x})"),
        "in_found" => format!("= ANY (ARRAY ({x}))"),
        "not_in" => format!("NOT IN (SELECT unnest(({x})::uuid[]))"),
        "each" => format!("jsonb_array_elements({x}) AS e (value)"),
        "each_text" => format!("jsonb_array_elements_text({x}) AS e (value)"),
        "lock" => format!("FOR NO KEY UPDATE OF {x}"),
        "lock_whole" => format!("FOR UPDATE OF {x}"),
        "lock_if_free" => format!("FOR UPDATE OF {x} SKIP LOCKED"),
        "lock_shared" => format!("FOR SHARE OF {x}"),
        "rows" => {
            let (table, query) = pair(x);
            format!(
                "ctid = ANY (ARRAY (SELECT {table}.ctid {query} FOR UPDATE OF {table} SKIP LOCKED))"
            )
        }
        "least" => format!("LEAST({x})"),
        "greatest" => format!("GREATEST({x})"),
        "returned_thread" => "{thread t}".to_owned(),
        "returned_run" => "{run r}".to_owned(),
        // Written so that no other condition implies it: the index is for finding runs by their
        // owner.
        "unfinished_of_owner" => format!("COALESCE({x}.finished_at, 'infinity') = 'infinity'"),
        "listed" => {
            let (order, query) = pair(x);
            let order = order.replace(" then ", ", ");
            format!(
                "SELECT p.* FROM (
                    SELECT q.*, count(*) OVER () AS found,
                        sum(pg_column_size(q.m_content)) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING)
                            - pg_column_size(q.m_content) AS before
                    FROM (SELECT {{message m}} {query} LIMIT :limit + 1) q
                ) p
                WHERE p.before < :bytes
                ORDER BY {order}
                LIMIT :limit"
            )
        }
        // An interval is multiplied as a floating-point number. That is exact for whole seconds
        // and for the rest, but not for the whole number of microseconds.
        "at_us" => format!(
            "'epoch'::timestamptz + ({x})::bigint / 1000000 * interval '1 second' \
             + ({x})::bigint % 1000000 * interval '1 microsecond'"
        ),
        "lateral" => {
            let (table, query) = pair(x);
            let (_, alias) = table
                .split_once(' ')
                .unwrap_or_else(|| panic!("no alias: {table}"));
            format!("CROSS JOIN LATERAL (SELECT f.* {query}) {alias}")
        }
        "by_index" => String::new(),
        _ => return None,
    })
}

fn of_sqlite(word: &str, x: &str) -> Option<String> {
    const NOW: &str = "CAST(round(unixepoch('now', 'subsec') * 1000) AS INTEGER)";
    Some(match word {
        // The time of the transaction, and of the clock, which is later if the statement had to
        // wait. On SQLite both are the time of the statement, in milliseconds since 1970.
        "now" | "clock" => NOW.to_owned(),
        // A number of milliseconds, to add to a time.
        "ms" => format!("({x})"),
        // Milliseconds since a time; the same, rounded up; milliseconds until a time.
        "ms_since" | "ms_since_up" => format!("({NOW} - {x})"),
        "ms_until" => format!("({x} - {NOW})"),
        // A time from a text with milliseconds since 1970.
        "at_ms" => format!("CAST({x} AS INTEGER)"),
        // An id (UUIDv7) above all ids that were made this number of milliseconds ago, or earlier.
        "id_after" => {
            format!("unhex(printf('%012x', max(0, {NOW} - ({x}) + 1)) || '00000000000000000000')")
        }
        // An id in hexadecimal, and back.
        "hex" => format!("lower(hex({x}))"),
        "uuid" => format!("unhex({x})"),
        // `{as type, value}`: a value with a type, which SQLite does not need. `{text column}`: an
        // enumerated value as a text.
        "as" => pair(x).1.to_owned(),
        "text" => x.to_owned(),
        // A condition: is one of the ids in a parameter; is one of the ids of a query, which is
        // evaluated once; is none of the ids in a parameter.
        "in" => format!("IN (SELECT unhex(i.value) FROM json_each({x}) i)"),
        "in_found" => format!("IN ({x})"),
        "not_in" => format!("NOT IN (SELECT unhex(i.value) FROM json_each({x}) i)"),
        // The values, or texts, of a JSON array, as a table `e` with the column `value`.
        "each" | "each_text" => format!("json_each({x}) e"),
        // Locks rows that: are to be changed; are to change hands; are not locked by others; must
        // stay as they are. SQLite has one writer and needs no locks.
        "lock" | "lock_whole" | "lock_if_free" | "lock_shared" => String::new(),
        // `WHERE {rows m, FROM messages m …}`: the rows of the table that the query finds, without
        // those that other transactions have locked.
        "rows" => {
            let (table, query) = pair(x);
            format!("rowid IN (SELECT {table}.rowid {query})")
        }
        // The least or greatest of these values, without NULLs. On SQLite the result is NULL if
        // one of them is NULL, so use it only where none is.
        "least" => format!("min({x})"),
        "greatest" => format!("max({x})"),
        "unfinished_of_owner" => format!("{x}.finished_at IS NULL"),
        // The columns after `UPDATE threads AS t … RETURNING`, `UPDATE runs AS r …`. SQLite needs
        // the table's own name there.
        "returned_thread" => "{thread threads}".to_owned(),
        "returned_run" => "{run runs}".to_owned(),
        // `{listed order then order, FROM messages m … ORDER BY …}`: a step of a list of messages.
        // It returns the first `:limit` rows, but stops after the row with which there are
        // `:bytes` stored bytes. `found` is the number of rows among the first `:limit` + 1. On
        // SQLite a window function copies the columns that go through it, so only sizes do.
        "listed" => {
            let (order, query) = pair(x);
            let order = order.replace(" then ", ", ");
            format!(
                "SELECT {{message m}}, p.found FROM (
                    SELECT q.*, count(*) OVER () AS found,
                        sum(q.size) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) - q.size AS before
                    FROM (
                        SELECT m.rowid AS row, m.thread_id AS m_thread_id, m.position AS m_position,
                            octet_length(m.content) AS size
                        {query} LIMIT :limit + 1
                    ) q
                ) p
                CROSS JOIN messages m ON m.rowid = p.row
                WHERE p.before < :bytes
                ORDER BY {order}
                LIMIT :limit"
            )
        }
        // The earlier end of a thread by two limits, or by the one that is set.
        "earlier" => {
            let (age, idle) = pair(x);
            format!(
                "min(COALESCE(t.created_at + {age}, t.last_active_at + {idle}), \
                 COALESCE(t.last_active_at + {idle}, t.created_at + {age}))"
            )
        }
        // A time from a text with microseconds since 1970.
        "at_us" => format!("CAST({x} AS INTEGER) / 1000"),
        // `{lateral messages m, FROM messages f … LIMIT …}`: joins, as `m`, the rows that the
        // query finds for each row before it.
        "lateral" => {
            let (table, query) = pair(x);
            let (_, alias) = table
                .split_once(' ')
                .unwrap_or_else(|| panic!("no alias: {table}"));
            format!("CROSS JOIN {table} ON {alias}.rowid IN (SELECT f.rowid {query})")
        }
        // `FROM threads t {by_index name}`: SQLite keeps no statistics. It uses this index, or
        // refuses the statement.
        "by_index" => format!("INDEXED BY {x}"),
        _ => return None,
    })
}

/// Returns text that is the same for both engines, given the words above.
fn of_both(word: &str, x: &str) -> Option<String> {
    Some(match word {
        "earlier" => {
            let (age, idle) = pair(x);
            format!("LEAST(t.created_at + {{ms {age}}}, t.last_active_at + {{ms {idle}}})")
        }
        // The time at which the thread `t` expires, or NULL: by its own limits, else by these, in
        // milliseconds. It must agree with `Lifetimes::expiry`.
        "expiry" => format!(
            "CASE WHEN t.max_age_ms IS NULL AND t.max_idle_ms IS NULL THEN {{earlier {x}}}
                ELSE {{earlier t.max_age_ms, t.max_idle_ms}} END"
        ),
        // The rest of a limit that has counted since the thread `t` was created, in milliseconds.
        "left_of" => format!("{{greatest 0, {x} - {{ms_since t.created_at}}}}"),
        // The run is active.
        "active" => format!("{x}.status IN ('in_progress', 'requires_action', 'cancelling')"),
        // The thread `t` has an unfinished run.
        "busy" => "(EXISTS (SELECT 1 FROM runs b WHERE b.thread_id = t.id AND {active b})
                OR EXISTS (SELECT 1 FROM runs b WHERE b.thread_id = t.id AND b.status = 'queued'))"
            .to_owned(),
        // The thread of a run has an active run, or a run that is queued before this one.
        "busy_before" => format!(
            "(EXISTS (SELECT 1 FROM runs b WHERE b.thread_id = {x}.thread_id AND {{active b}})
                OR EXISTS (
                    SELECT 1 FROM runs b
                    WHERE b.thread_id = {x}.thread_id AND b.status = 'queued'
                        AND (b.priority, b.seq) < ({x}.priority, {x}.seq)
                ))"
        ),
        // The run has started and not ended; the run is that of the lease in the parameters.
        "at_work" => format!("{x}.queued_input IS NULL AND {x}.finished_at IS NULL"),
        "leased" => format!("{x}.id = :run AND {x}.fence = :fence"),
        // The ids of the unfinished runs of threads: `{unfinished = :thread}`. Each half uses an
        // index of its own.
        "unfinished" => format!(
            "SELECT u.id FROM runs u WHERE u.thread_id {x} AND {{active u}}
            UNION ALL
            SELECT u.id FROM runs u WHERE u.thread_id {x} AND u.status = 'queued'"
        ),
        // The thread `t`: has the key of the parameters; is the key's current one; has the key and
        // is not being deleted.
        "of_key" => "t.tenant = :tenant AND t.user_key = :user AND t.scope_kind = {scope_kind} \
                     AND t.scope_name = :scope_name"
            .to_owned(),
        "scope_kind" => "{as scope_kind, :scope_kind}".to_owned(),
        "current_of_key" => "{of_key} AND t.lifecycle = 'current'".to_owned(),
        "lasting_of_key" => "{of_key} AND t.lifecycle <> 'deleting'".to_owned(),
        // The newest archived thread of the key.
        "newest_archived_of_key" => "(
                SELECT a.id FROM threads a
                WHERE a.tenant = :tenant AND a.user_key = :user AND a.scope_kind = {scope_kind}
                    AND a.scope_name = :scope_name AND a.lifecycle = 'archived'
                ORDER BY a.id DESC
                LIMIT 1
            )"
        .to_owned(),
        // The thread `t` is the key's current one or, if there is none, the newest archived one,
        // which is looked up only then.
        "newest_of_key" => "t.id = COALESCE((
                SELECT c.id FROM threads c
                WHERE c.tenant = :tenant AND c.user_key = :user AND c.scope_kind = {scope_kind}
                    AND c.scope_name = :scope_name AND c.lifecycle = 'current'
            ), {newest_archived_of_key})"
            .to_owned(),
        // The columns of a thread, run or message for rows.rs; `{run runs}` after UPDATE …
        // RETURNING in SQLite.
        "thread" => columns(x, "t", THREAD),
        "run" => columns(x, "r", RUN),
        "message" => columns(x, "m", MESSAGE),
        // The same columns as results of a Postgres function: their names, and the names with
        // types.
        "thread_names" => names("t", THREAD),
        "run_names" => names("r", RUN),
        "message_names" => names("m", MESSAGE),
        "thread_types" => types("t", THREAD),
        "run_types" => types("r", RUN),
        "message_types" => types("m", MESSAGE),
        "upstream_orphan" => columns(x, "o", UPSTREAM_ORPHAN),
        // The number of queued runs of the thread `t`; that number and the status of its active
        // run.
        "queue_depth" => {
            "(SELECT count(*) FROM runs q WHERE q.thread_id = t.id AND q.status = 'queued') AS queue_depth"
                .to_owned()
        }
        "activity" => "{queue_depth}, (
                SELECT {text a.status} FROM runs a WHERE a.thread_id = t.id AND {active a}
            ) AS active_status"
            .to_owned(),
        // The position of the first message of a run; above all positions if it has none yet.
        "first_position" => format!("{{first_position_of {x}.id}}"),
        "first_position_of" => {
            format!(
                "COALESCE((SELECT min(f.position) FROM messages f WHERE f.run_id = {x}), 9223372036854775807)"
            )
        }
        // The position of the first message of a run that has started. If its messages were
        // removed, the first position of the messages that came into the transcript since it
        // started.
        "started_position" => format!(
            "COALESCE((SELECT min(f.position) FROM messages f WHERE f.run_id = {x}.id), (
                SELECT min(f.position) FROM runs o JOIN messages f ON f.run_id = o.id
                WHERE o.thread_id = {x}.thread_id AND COALESCE(o.started_at, o.finished_at) >= {x}.started_at
            ))"
        ),
        _ => return None,
    })
}

/// Returns the text of a word about an item of a batch.
fn of_item(word: &str, x: &str) -> Option<String> {
    Some(match word {
        // The thread `t` is the current one of an item's key; `k` is the use of its idempotency
        // key.
        "current_of" => format!(
            "t.tenant = {x}.tenant AND t.user_key = {x}.user_key AND t.scope_kind = {x}.scope_kind
                AND t.scope_name = {x}.scope_name AND t.lifecycle = 'current'"
        ),
        "use_of" => format!(
            "k.tenant = {x}.tenant AND k.user_key = {x}.user_key AND k.scope_kind = {x}.scope_kind
                AND k.scope_name = {x}.scope_name AND k.key = {x}.idempotency_key"
        ),
        // A use of an idempotency key that no longer counts: it is older than this number of
        // milliseconds, or its message was not taken and the sender was told so.
        "forgotten" => {
            let (used, remember) = pair(x);
            format!(
                "({used}.created_at <= {{clock}} - {{ms {remember}}} OR EXISTS (
                    SELECT 1 FROM runs o WHERE o.id = {used}.run_id AND o.error ->> 'code' = '{}'
                ))",
                RunErrorCode::NotRecorded.as_str()
            )
        }
        // The run `r` is that of the lease of an item.
        "leased_by" => format!("r.id = {x}.run AND r.fence = {x}.fence"),
        // The upstream thread of an item is recorded: as an upstream orphan, or as the thread's
        // own.
        "has_recorded" => format!(
            "(EXISTS (SELECT 1 FROM upstream_orphans o WHERE o.id = {x}.intent AND o.upstream_id = {x}.upstream_thread)
                OR EXISTS (
                    SELECT 1 FROM threads t
                    WHERE t.id = (SELECT r.thread_id FROM runs r WHERE r.id = {x}.run)
                        AND t.upstream_thread_id = {x}.upstream_thread
                ))"
        ),
        _ => return None,
    })
}

/// Returns `table.column AS prefix_column` for each column. A column in brackets is enumerated.
fn columns(table: &str, prefix: &str, names: &str) -> String {
    let column = |name: &str| match name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
    {
        Some(name) => format!("{{text {table}.{name}}} AS {prefix}_{name}"),
        None => format!("{table}.{name} AS {prefix}_{name}"),
    };
    names.split(' ').map(column).collect::<Vec<_>>().join(", ")
}

/// Returns `prefix_column` for each column.
fn names(prefix: &str, names: &str) -> String {
    let name = |name: &str| format!("{prefix}_{}", name.trim_matches(['[', ']']));
    names.split(' ').map(name).collect::<Vec<_>>().join(", ")
}

/// Returns `prefix_column type` for each column. The type of an enumerated one is `text`.
fn types(prefix: &str, names: &str) -> String {
    let typed = |name: &str| {
        let kind = match name {
            "id" | "run_id" => "uuid",
            _ if name.ends_with("thread_id") && name != "upstream_thread_id" => "uuid",
            _ if name.ends_with("_at") => "timestamptz",
            _ if name.ends_with("_ms")
                || name.ends_with("_count")
                || name.ends_with("_tokens")
                || name.ends_with("messages") =>
            {
                "bigint"
            }
            _ if name.ends_with("_pending") => "boolean",
            "seq" | "fence" | "position" => "bigint",
            "metadata" | "upstream_cleanup" | "unsettled_run" | "required_action" | "error"
            | "usage" | "recovery" | "content" => "jsonb",
            _ => "text",
        };
        format!("{prefix}_{} {kind}", name.trim_matches(['[', ']']))
    };
    names.split(' ').map(typed).collect::<Vec<_>>().join(", ")
}

const THREAD: &str = "id tenant user_key [scope_kind] scope_name upstream upstream_thread_id [lifecycle] \
    previous_thread_id metadata message_count run_count created_at last_active_at max_age_ms \
    max_idle_ms archived_at [deletion] rollover_pending carried_messages upstream_cleanup \
    unsynced_messages unsettled_run input_tokens cached_input_tokens output_tokens reasoning_tokens \
    context_tokens";

const RUN: &str = "id thread_id seq [status] [strategy] assistant metadata fence rerun upstream_run_id required_action \
    error usage recovery created_at started_at finished_at deadline_at rollback_pending";

const MESSAGE: &str = "id thread_id position [role] content run_id upstream_message_id [upstream_sync] [run_outcome] \
    created_at";

const UPSTREAM_ORPHAN: &str = "id thread_id upstream [kind] upstream_id attempts";
