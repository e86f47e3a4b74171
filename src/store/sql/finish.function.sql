-- Ends runs: writes the status, reply, counters and log of each. Returns one row for each item, in
-- the order of the items.
--
-- items       array of objects, one for each run; the fields are listed below
-- alone       true: there is a single item, which waits for rows that other transactions have
--             locked. false: an item whose rows are locked is `held`. Nothing of it was stored,
--             and the caller sends it again, alone.
--
-- Outcomes:
-- - `finished`, also if the run had ended with the same status under this lease before.
-- - `must_discard`: the run is marked to be discarded, and the item does not discard it.
-- - `lost`: the lease was lost.
-- - `held`.
--
-- Locks are taken in this order: the run, the messages that the thread counts, the thread. An item
-- of a batch first tries to lock its run and its thread, without waiting. It goes on only with
-- both, else it is `held`.
--
-- Changes to other messages than the new ones depend on fields of the item. So a run that ended
-- well reads no other messages. A part of the log may be stored already, if the answer to its
-- recording did not come in time.
DECLARE
    i record;
    ending runs%ROWTYPE;
    input jsonb;
    said bigint;
    replies bigint;
    removed bigint;
    marked bigint;
    sent bigint;
    first bigint;
    last_position bigint;
    at timestamptz;
BEGIN
    PERFORM set_config('lock_timeout', CASE WHEN alone THEN '8s' ELSE '500ms' END, true);
    <<next_item>>
    FOR i IN SELECT * FROM jsonb_to_recordset(items) AS x (
        run uuid, fence bigint, status run_status, error jsonb, usage jsonb, upstream_run text, upstream_thread text,
        reply uuid, reply_content jsonb, reply_upstream_id text, reply_sync upstream_sync,
        said_sync upstream_sync, run_outcome run_status, marks_said boolean, synced boolean,
        unsettled_run jsonb, discard boolean,
        -- keeps_said: also if the run is discarded, its messages stay. An earlier run had brought
        -- them into the transcript.
        keeps_said boolean,
        first_offset bigint, events jsonb, end_offset bigint, drops_log boolean, unacknowledged bigint,
        -- Tokens of the last round. The usage counts all rounds.
        context_tokens bigint
    ) LOOP
        outcome := NULL;
        r_id := NULL;
        m_id := NULL;
        IF alone THEN
            SELECT r.* INTO ending FROM runs r
            WHERE r.id = i.run AND r.fence = i.fence AND r.finished_at IS NULL
            FOR NO KEY UPDATE;
        ELSE
            SELECT r.* INTO ending FROM runs r JOIN threads t ON t.id = r.thread_id
            WHERE r.id = i.run AND r.fence = i.fence AND r.finished_at IS NULL
            FOR NO KEY UPDATE OF r, t SKIP LOCKED;
        END IF;
        IF ending.id IS NULL THEN
            SELECT r.* INTO ending FROM runs r WHERE r.id = i.run AND r.fence = i.fence;
            IF ending.id IS NOT NULL AND ending.finished_at IS NULL THEN
                outcome := 'held';
            ELSIF ending.id IS NULL OR ending.status <> i.status THEN
                outcome := 'lost';
            ELSE
                outcome := 'finished';
                SELECT {thread t}, {run r}, {message m}, {activity}
                INTO {thread_names}, {run_names}, {message_names}, queue_depth, active_status
                FROM runs r
                JOIN threads t ON t.id = r.thread_id
                LEFT JOIN messages m ON m.run_id = r.id AND m.role = 'assistant'
                WHERE r.id = i.run;
            END IF;
            RETURN NEXT;
            CONTINUE next_item;
        END IF;
        IF ending.rollback_pending AND NOT i.discard THEN
            outcome := 'must_discard';
            RETURN NEXT;
            CONTINUE next_item;
        END IF;
        outcome := 'finished';
        at := clock_timestamp();
        input := CASE WHEN NOT i.discard THEN ending.queued_input END;
        said := COALESCE(jsonb_array_length(input), 0);
        replies := CASE WHEN i.reply IS NULL THEN 0 ELSE 1 END;
        removed := 0;
        marked := 0;
        sent := 0;

        UPDATE runs r SET status = i.status, error = i.error, usage = i.usage,
            upstream_run_id = COALESCE(i.upstream_run, r.upstream_run_id),
            earlier_upstream_run_ids = CASE WHEN r.upstream_run_id <> i.upstream_run
                THEN COALESCE(r.earlier_upstream_run_ids, '[]') || to_jsonb(r.upstream_run_id)
                ELSE r.earlier_upstream_run_ids END,
            unacknowledged_requests = r.unacknowledged_requests + i.unacknowledged, rollback_pending = i.discard,
            required_action = NULL, partial_reply = NULL, tool_outputs = NULL, queued_input = NULL,
            finished_at = at
        WHERE r.id = i.run
        RETURNING {run r} INTO {run_names};
        IF NOT i.drops_log THEN
            INSERT INTO run_events AS l (run_id, first_offset, events, end_offset)
            VALUES (i.run, i.first_offset, i.events, i.end_offset)
            ON CONFLICT (run_id, first_offset) DO UPDATE SET events = excluded.events, end_offset = excluded.end_offset
                WHERE l.end_offset < excluded.end_offset;
        ELSIF i.first_offset > 0 THEN
            DELETE FROM run_events l WHERE l.run_id = i.run;
        END IF;

        -- The run's own messages mark where the earlier ones end, so they are removed after this.
        IF i.synced THEN
            first := {first_position ending};
            UPDATE messages m SET upstream_sync = 'present'
            WHERE m.thread_id = ending.thread_id AND m.position < first AND m.upstream_sync = 'missing';
            GET DIAGNOSTICS sent = ROW_COUNT;
            UPDATE messages m SET upstream_sync = 'present'
            WHERE m.thread_id = ending.thread_id AND m.position < first AND m.upstream_sync = 'unknown';
        END IF;
        IF i.discard AND NOT i.keeps_said THEN
            DELETE FROM messages m WHERE m.run_id = i.run;
            GET DIAGNOSTICS removed = ROW_COUNT;
        END IF;
        IF i.marks_said THEN
            UPDATE messages m SET upstream_sync = i.said_sync, run_outcome = i.run_outcome WHERE m.run_id = i.run;
            GET DIAGNOSTICS marked = ROW_COUNT;
        END IF;

        UPDATE threads t SET
            message_count = t.message_count + said + replies - removed,
            last_position = t.last_position + said + replies,
            unsynced_messages = t.unsynced_messages - sent
                + CASE WHEN i.said_sync = 'missing' THEN said + marked ELSE 0 END
                + CASE WHEN i.reply_sync = 'missing' THEN 1 ELSE 0 END,
            unsettled_run = COALESCE(i.unsettled_run, CASE WHEN NOT i.synced THEN t.unsettled_run END),
            upstream_thread_id = COALESCE(i.upstream_thread, t.upstream_thread_id),
            input_tokens = t.input_tokens + COALESCE((i.usage ->> 'input_tokens')::bigint, 0),
            cached_input_tokens = t.cached_input_tokens + COALESCE((i.usage ->> 'cached_input_tokens')::bigint, 0),
            output_tokens = t.output_tokens + COALESCE((i.usage ->> 'output_tokens')::bigint, 0),
            reasoning_tokens = t.reasoning_tokens + COALESCE((i.usage ->> 'reasoning_tokens')::bigint, 0),
            context_tokens = COALESCE(i.context_tokens, t.context_tokens),
            last_active_at = at
        WHERE t.id = ending.thread_id
        RETURNING {thread t}, t.last_position, {activity}
        INTO {thread_names}, last_position, queue_depth, active_status;
        IF said > 0 THEN
            INSERT INTO messages (id, thread_id, position, role, content, run_id, upstream_sync, run_outcome, created_at)
            SELECT substr(s.item ->> 'id', 5)::uuid, t_id, last_position - replies - said + s.n,
                'user', s.item -> 'content', i.run, i.said_sync, i.run_outcome, at
            FROM jsonb_array_elements(input) WITH ORDINALITY AS s (item, n);
        END IF;
        IF i.reply IS NOT NULL THEN
            INSERT INTO messages AS m (
                id, thread_id, position, role, content, run_id, upstream_message_id, upstream_sync, run_outcome, created_at
            )
            VALUES (
                i.reply, t_id, last_position, 'assistant', i.reply_content, i.run, i.reply_upstream_id,
                i.reply_sync, i.run_outcome, at
            )
            RETURNING {message m} INTO {message_names};
        END IF;
        RETURN NEXT;
    END LOOP;
END
