-- Admits runs: finds or creates the current thread of each message's key, and starts or queues the
-- run. Returns one row for each item, in the order of the items.
--
-- items       array of objects, one for each message; the fields are listed below
-- alone       true: there is a single item. It waits for rows and keys that other transactions
--             have locked. It may have been sent before. If it was recorded, the function answers
--             with the recorded state. false: an item whose rows or key are locked is `held`.
--             Nothing of it was stored, and the caller sends it again, alone.
--
-- Outcomes: `recorded`, `merged`, `held`. Refusals, of which nothing is stored: `busy`,
-- `repeated`, `other_upstream`, `no_thread`, `no_message`.
--
-- This function, like every statement that waits for row locks, locks in this order: the run, the
-- thread, the idempotency key. The statements that ask whether a thread is free begin after its
-- row is locked, so no answer is out of date. Admission is the only step that adds an unfinished
-- run.
DECLARE
    i record;
    known threads%ROWTYPE;
    last uuid;
    key_hash bigint;
    at timestamptz;
    expires_at timestamptz;
    is_forgotten boolean;
    is_busy boolean;
    ahead bigint;
    last_position bigint;
BEGIN
    PERFORM set_config('lock_timeout', CASE WHEN alone THEN '8s' ELSE '500ms' END, true);
    <<next_item>>
    FOR i IN SELECT * FROM jsonb_to_recordset(items) AS x (
        tenant text, user_key text, scope_kind scope_kind, scope_name text,
        -- max_age and max_idle: the limits of the scope. from_now and from_last_activity: the
        -- caller's limit for the thread, which is set by at most one of them.
        max_age bigint, max_idle bigint, from_now bigint, from_last_activity bigint,
        upstream text, assistant text, strategy run_strategy, metadata jsonb,
        -- again: the run has no message. It is queued even on an idle thread, and takes the last
        -- messages when it starts.
        again boolean,
        thread uuid, run uuid, message uuid, message_name text, content jsonb, timeout bigint, replica uuid,
        -- intent: id for the row of the intent to create an upstream thread, if a fresh thread
        -- needs one. orphan_after: how long that creation may go unacknowledged.
        intent uuid, orphan_after bigint,
        idempotency_key text, request_hash text, remember bigint,
        max_messages bigint, max_bytes bigint
    ) LOOP
        outcome := NULL;
        seen_upstream := NULL;
        r_id := NULL;

        -- A repeated message waits for no lock, whatever holds the thread.
        IF i.idempotency_key IS NOT NULL AND NOT alone THEN
            SELECT {forgotten k, i.remember} INTO is_forgotten FROM idempotency_keys k WHERE {use_of i};
            IF NOT is_forgotten THEN
                outcome := 'repeated';
                RETURN NEXT;
                CONTINUE next_item;
            END IF;
        END IF;

        last := NULL;
        IF i.strategy = 'merge' THEN
            SELECT (
                SELECT r.id FROM runs r
                WHERE r.thread_id = t.id AND r.status = 'queued'
                ORDER BY r.priority DESC, r.seq DESC
                LIMIT 1
            ) INTO last
            FROM threads t
            WHERE {current_of i};
        END IF;
        IF last IS NOT NULL AND alone THEN
            PERFORM FROM runs r WHERE r.id = last FOR NO KEY UPDATE;
        ELSIF last IS NOT NULL THEN
            PERFORM FROM runs r WHERE r.id = last FOR NO KEY UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                outcome := 'held';
                RETURN NEXT;
                CONTINUE next_item;
            END IF;
        END IF;

        -- Lock the key's thread or, if there is none, the key. Every admission that creates a
        -- thread has locked its key.
        LOOP
            IF alone THEN
                SELECT t.* INTO known FROM threads t
                WHERE {current_of i}
                FOR NO KEY UPDATE;
            ELSE
                SELECT t.* INTO known FROM threads t
                WHERE {current_of i}
                FOR NO KEY UPDATE SKIP LOCKED;
            END IF;
            EXIT WHEN known.id IS NOT NULL;
            key_hash := hashtextextended(
                concat_ws(E'\x1f', 'threadkeeper', i.tenant, i.user_key, i.scope_kind, i.scope_name), 0
            );
            IF alone THEN
                PERFORM pg_advisory_xact_lock(key_hash);
            ELSIF NOT pg_try_advisory_xact_lock(key_hash) THEN
                outcome := 'held';
                EXIT;
            END IF;
            EXIT WHEN NOT EXISTS (
                SELECT FROM threads t
                WHERE {current_of i}
            );
            IF NOT alone THEN
                outcome := 'held';
                EXIT;
            END IF;
        END LOOP;
        IF outcome = 'held' THEN
            RETURN NEXT;
            CONTINUE next_item;
        END IF;
        at := clock_timestamp();

        -- Look for an earlier try of the same item. A batch does that for merges too. A merge
        -- creates no run, so no duplicate run id would refuse a first try that arrives after its
        -- caller gave up.
        IF alone OR i.strategy = 'merge' THEN
            SELECT {run r}, 'recorded' INTO {run_names}, outcome FROM runs r WHERE r.id = i.run;
            IF r_id IS NULL AND i.strategy = 'merge' THEN
                -- Find the run that the message has joined, queued or not.
                SELECT {run r}, 'merged' INTO {run_names}, outcome FROM runs r
                WHERE r.id = COALESCE(
                    (SELECT m.run_id FROM messages m WHERE m.id = i.message),
                    (
                        SELECT q.id FROM runs q
                        WHERE q.thread_id = known.id AND q.status = 'queued'
                            AND q.queued_input @> jsonb_build_array(jsonb_build_object('id', i.message_name))
                        LIMIT 1
                    )
                );
            END IF;
            IF r_id IS NOT NULL THEN
                SELECT {thread t}, (
                    SELECT count(*) + 1 FROM runs q
                    WHERE q.thread_id = r_thread_id AND q.status = 'queued'
                        AND (q.priority, q.seq) < (SELECT r.priority, r.seq FROM runs r WHERE r.id = r_id)
                ) INTO {thread_names}, queue_position
                FROM threads t WHERE t.id = r_thread_id;
                RETURN NEXT;
                CONTINUE next_item;
            END IF;
        END IF;

        IF i.idempotency_key IS NOT NULL THEN
            SELECT {forgotten k, i.remember} INTO is_forgotten FROM idempotency_keys k WHERE {use_of i};
            IF is_forgotten THEN
                DELETE FROM idempotency_keys k WHERE {use_of i};
            ELSIF FOUND THEN
                outcome := 'repeated';
                RETURN NEXT;
                CONTINUE next_item;
            END IF;
        END IF;

        IF known.max_age_ms IS NULL AND known.max_idle_ms IS NULL THEN
            expires_at := LEAST(
                known.created_at + i.max_age * interval '1 millisecond',
                known.last_active_at + i.max_idle * interval '1 millisecond'
            );
        ELSE
            expires_at := LEAST(
                known.created_at + known.max_age_ms * interval '1 millisecond',
                known.last_active_at + known.max_idle_ms * interval '1 millisecond'
            );
        END IF;

        IF i.again AND (known.id IS NULL OR expires_at <= at) THEN
            outcome := 'no_thread';
            RETURN NEXT;
            CONTINUE next_item;
        END IF;
        IF known.id IS NULL OR expires_at <= at THEN
            IF known.id IS NOT NULL THEN
                UPDATE threads t SET lifecycle = 'archived', archived_at = at, due_at = at WHERE t.id = known.id;
            END IF;
            INSERT INTO threads AS t (
                id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, previous_thread_id,
                message_count, last_position, run_count, created_at, last_active_at, max_age_ms, max_idle_ms, due_at
            )
            VALUES (
                i.thread, i.tenant, i.user_key, i.scope_kind, i.scope_name, i.upstream, 'current',
                COALESCE(known.id, (
                    SELECT a.id FROM threads a
                    WHERE a.tenant = i.tenant AND a.user_key = i.user_key AND a.scope_kind = i.scope_kind
                        AND a.scope_name = i.scope_name AND a.lifecycle = 'archived'
                    ORDER BY a.id DESC
                    LIMIT 1
                )),
                1, 1, 1, at, at, i.from_now, i.from_last_activity,
                at + COALESCE(i.from_now, i.from_last_activity, LEAST(i.max_age, i.max_idle)) * interval '1 millisecond'
            )
            RETURNING {thread t}, t.last_position INTO {thread_names}, last_position;
            is_busy := false;
            ahead := 0;
            IF i.intent IS NOT NULL THEN
                INSERT INTO upstream_orphans (id, thread_id, upstream, kind, created_by, due_at)
                VALUES (
                    i.intent, t_id, i.upstream, 'thread', i.replica, at + i.orphan_after * interval '1 millisecond'
                );
            END IF;
        ELSE
            IF known.upstream <> i.upstream THEN
                outcome := 'other_upstream';
                seen_upstream := known.upstream;
                RETURN NEXT;
                CONTINUE next_item;
            END IF;
            IF i.again
                AND (
                    SELECT m.position FROM messages m WHERE m.thread_id = known.id AND m.role = 'user'
                    ORDER BY m.position DESC LIMIT 1
                ) IS NULL
                AND NOT EXISTS (SELECT FROM runs r WHERE r.thread_id = known.id AND {active r})
                AND NOT EXISTS (SELECT FROM runs r WHERE r.thread_id = known.id AND r.status = 'queued')
            THEN
                outcome := 'no_message';
                RETURN NEXT;
                CONTINUE next_item;
            END IF;
            IF last IS NOT NULL THEN
                UPDATE runs r
                SET queued_input = r.queued_input
                    || jsonb_build_array(jsonb_build_object('id', i.message_name, 'content', i.content))
                WHERE r.id = last AND r.queued_input IS NOT NULL AND (r.thread_id = known.id) IS TRUE
                    AND r.assistant = i.assistant AND r.metadata = i.metadata AND r.rerun IS NULL
                    AND jsonb_array_length(r.queued_input) < i.max_messages
                    AND octet_length(r.queued_input::text) + octet_length(i.content::text) <= i.max_bytes
                RETURNING {run r} INTO {run_names};
            END IF;
            -- A message with a limit for its thread replaces the thread's own limits. Without one,
            -- `due_at`, which is indexed, keeps its value.
            UPDATE threads t SET
                run_count = t.run_count + CASE WHEN r_id IS NULL THEN 1 ELSE 0 END,
                message_count = t.message_count + CASE WHEN r_id IS NULL AND NOT (b.is_busy OR i.again) THEN 1 ELSE 0 END,
                last_position = t.last_position + CASE WHEN r_id IS NULL AND NOT (b.is_busy OR i.again) THEN 1 ELSE 0 END,
                last_active_at = at,
                max_age_ms = CASE
                    WHEN i.from_now IS NOT NULL
                    THEN GREATEST(0, ceil(EXTRACT(epoch FROM at - t.created_at) * 1000)::bigint + i.from_now)
                    WHEN i.from_last_activity IS NULL THEN t.max_age_ms
                END,
                max_idle_ms = CASE WHEN i.from_now IS NULL THEN COALESCE(i.from_last_activity, t.max_idle_ms) END,
                due_at = COALESCE(
                    at + COALESCE(i.from_now, i.from_last_activity) * interval '1 millisecond', t.due_at
                )
            FROM (
                SELECT a.ahead, a.ahead > 0
                    OR EXISTS (SELECT FROM runs r WHERE r.thread_id = known.id AND {active r}) AS is_busy
                FROM (
                    SELECT count(*) AS ahead FROM runs r WHERE r.thread_id = known.id AND r.status = 'queued'
                ) a
            ) b
            WHERE t.id = known.id AND (i.strategy <> 'reject' OR NOT b.is_busy)
            RETURNING {thread t}, t.last_position, b.is_busy, b.ahead
            INTO {thread_names}, last_position, is_busy, ahead;
            IF NOT FOUND THEN
                outcome := 'busy';
                RETURN NEXT;
                CONTINUE next_item;
            END IF;
            is_busy := is_busy OR i.again;
        END IF;

        IF r_id IS NULL THEN
            outcome := 'recorded';
            -- A run that goes before all queued runs gets a priority lower than any before: minus
            -- its own seq.
            INSERT INTO runs AS r (
                id, thread_id, seq, priority, status, strategy, assistant, metadata, queued_input, rerun, owner, fence,
                timeout_ms, created_at, started_at, deadline_at
            )
            VALUES (
                i.run, t_id, t_run_count,
                CASE WHEN is_busy AND i.strategy IN ('interrupt', 'rollback') THEN -t_run_count ELSE 0 END,
                CASE WHEN is_busy THEN run_status 'queued' ELSE run_status 'in_progress' END,
                i.strategy, i.assistant, i.metadata,
                CASE WHEN i.again THEN jsonb '[]'
                    WHEN is_busy THEN jsonb_build_array(jsonb_build_object('id', i.message_name, 'content', i.content)) END,
                CASE WHEN i.again THEN 'waiting' END, i.replica, 1, i.timeout, at,
                CASE WHEN NOT is_busy THEN at END,
                CASE WHEN NOT is_busy THEN at + i.timeout * interval '1 millisecond' END
            )
            RETURNING {run r} INTO {run_names};
            IF NOT is_busy THEN
                INSERT INTO messages (id, thread_id, position, role, content, run_id, created_at)
                VALUES (i.message, t_id, last_position, 'user', i.content, i.run, at);
            END IF;
            queue_position := CASE WHEN i.strategy IN ('interrupt', 'rollback') THEN 1 ELSE ahead + 1 END;
        ELSE
            outcome := 'merged';
        END IF;
        IF i.idempotency_key IS NOT NULL THEN
            INSERT INTO idempotency_keys (tenant, user_key, scope_kind, scope_name, key, run_id, request_hash, created_at)
            VALUES (
                i.tenant, i.user_key, i.scope_kind, i.scope_name, i.idempotency_key, r_id,
                decode(i.request_hash, 'hex'), at
            );
        END IF;
        RETURN NEXT;
    END LOOP;
END
