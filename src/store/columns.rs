//! Pieces of statements that both backends share.

/// `table.column AS prefix_column`, for each column.
macro_rules! columns {
    ($table:literal, $prefix:literal, $first:ident $(, $column:ident)*) => {
        concat!(
            $table, ".", stringify!($first), " AS ", $prefix, stringify!($first),
            $(", ", $table, ".", stringify!($column), " AS ", $prefix, stringify!($column)),*
        )
    };
}

/// The columns of [`ThreadRow`](super::rows::ThreadRow), of a table named `t` unless another name is given.
macro_rules! thread_columns {
    () => {
        $crate::store::columns::thread_columns!("t")
    };
    ($table:literal) => {
        $crate::store::columns::columns!(
            $table,
            "t_",
            id,
            tenant,
            user_key,
            scope_kind,
            scope_name,
            upstream,
            upstream_thread_id,
            lifecycle,
            previous_thread,
            metadata,
            message_count,
            run_count,
            created_at,
            last_active_at,
            max_age_ms,
            max_idle_ms,
            archived_at,
            deletion,
            rolls,
            carried,
            removed,
            backlog,
            leftover
        )
    };
}

/// The columns of [`RunRow`](super::rows::RunRow), of a table named `r` unless another name is given.
macro_rules! run_columns {
    () => {
        $crate::store::columns::run_columns!("r")
    };
    ($table:literal) => {
        $crate::store::columns::columns!(
            $table,
            "r_",
            id,
            thread_id,
            seq,
            status,
            strategy,
            assistant,
            metadata,
            fence,
            upstream_run_id,
            required_action,
            error,
            usage,
            created_at,
            started_at,
            finished_at,
            deadline_at,
            discard
        )
    };
}

/// The current thread of a key, of a table named `t`: tenant, user, scope's kind and name are the first parameters.
macro_rules! current_of_key {
    () => {
        "t.tenant = $1 AND t.user_key = $2 AND t.scope_kind = $3 AND t.scope_name = $4 AND t.lifecycle = 'current'"
    };
}

/// All threads of a key, of a table named `t`, but for those that are being deleted: parameters as above.
macro_rules! lasting_of_key {
    () => {
        "t.tenant = $1 AND t.user_key = $2 AND t.scope_kind = $3 AND t.scope_name = $4 AND t.lifecycle <> 'deleting'"
    };
}

/// The newest archived thread of a key: parameters as above.
macro_rules! newest_archived_of_key {
    () => {
        "(
            SELECT a.id FROM threads a
            WHERE a.tenant = $1 AND a.user_key = $2 AND a.scope_kind = $3 AND a.scope_name = $4
                AND a.lifecycle = 'archived'
            ORDER BY a.id DESC
            LIMIT 1
        )"
    };
}

/// The thread of a key, of a table named `t`, that is current or else the newest that is archived: parameters as above.
/// The archive is not looked at if there is a current one.
macro_rules! newest_of_key {
    () => {
        concat!(
            "t.id = COALESCE((
                SELECT c.id FROM threads c
                WHERE c.tenant = $1 AND c.user_key = $2 AND c.scope_kind = $3 AND c.scope_name = $4
                    AND c.lifecycle = 'current'
            ), ",
            $crate::store::columns::newest_archived_of_key!(),
            ")"
        )
    };
}

/// The columns of [`MessageRow`](super::rows::MessageRow), of a table named `m` unless another name is given.
macro_rules! message_columns {
    () => {
        $crate::store::columns::message_columns!("m")
    };
    ($table:literal) => {
        $crate::store::columns::columns!(
            $table,
            "m_",
            id,
            thread_id,
            position,
            role,
            content,
            run_id,
            upstream_message_id,
            context,
            ended,
            created_at
        )
    };
}

/// Where the messages of a run begin, given the name of a table that has its `id`; past all others if it has none yet.
macro_rules! first_position {
    ($run:literal) => {
        concat!(
            "COALESCE((SELECT min(f.position) FROM messages f WHERE f.run_id = ",
            $run,
            ".id), 9223372036854775807)"
        )
    };
}

/// Which run is meant where something is noted of one at work: the id, then the fence.
macro_rules! of_a_run_at_work {
    () => {
        " WHERE id = $1 AND fence = $2 AND input IS NULL AND finished_at IS NULL"
    };
}

/// Where the messages of a run that has started stand or, if they were removed, stood: before all that came into the
/// transcript since it started.
macro_rules! started_position {
    ($run:literal) => {
        concat!(
            "COALESCE((SELECT min(f.position) FROM messages f WHERE f.run_id = ",
            $run,
            ".id), (
                SELECT min(f.position) FROM runs o JOIN messages f ON f.run_id = o.id
                WHERE o.thread_id = ",
            $run,
            ".thread_id AND COALESCE(o.started_at, o.finished_at) >= ",
            $run,
            ".started_at
            ))"
        )
    };
}

/// What a [`ThreadWithActivity`](super::rows::ThreadWithActivity) has besides the columns of the thread `t`.
macro_rules! activity {
    () => {
        concat!(
            $crate::store::columns::queue_depth!(),
            ", (
                SELECT o.status FROM runs o
                WHERE o.thread_id = t.id AND o.status IN ('in_progress', 'requires_action', 'cancelling')
            ) AS active_status"
        )
    };
}

/// The ids of the unfinished runs of a thread, or of several, as what follows a run's `thread_id` says. Each half is read by
/// an index of its own.
macro_rules! unfinished_runs {
    ($($of_thread:tt)+) => {
        concat!(
            "SELECT u.id FROM runs u
            WHERE u.thread_id",
            $($of_thread)+,
            " AND u.status IN ('in_progress', 'requires_action', 'cancelling')
            UNION ALL
            SELECT u.id FROM runs u WHERE u.thread_id",
            $($of_thread)+,
            " AND u.status = 'queued'"
        )
    };
}

/// How many runs of the thread `t` wait for their turn.
macro_rules! queue_depth {
    () => {
        "(SELECT count(*) FROM runs o WHERE o.thread_id = t.id AND o.status = 'queued') AS queue_depth"
    };
}

pub(super) use {
    activity, columns, current_of_key, first_position, lasting_of_key, message_columns,
    newest_archived_of_key, newest_of_key, of_a_run_at_work, queue_depth, run_columns, started_position,
    thread_columns, unfinished_runs,
};
