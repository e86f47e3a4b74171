-- Binds the threads of active runs to the upstream threads that were created for them. Returns one
-- row for each item, in the order of the items.
--
-- items       array of objects, one for each run; the fields are listed below
-- alone       true: there is a single item, which waits for rows that other transactions have
--             locked. false: an item whose rows are locked is `held`. Nothing of it was stored,
--             and the caller sends it again, alone.
--
-- Outcomes:
-- - `bound`.
-- - `lost`: the lease was lost. The id is recorded all the same: as an upstream orphan, or as the
--   thread's own by an earlier call.
-- - `unrecorded`: the lease was lost, and the database has no row for the id.
-- - `held`.
--
-- Locks are taken in this order: the run, the messages that the thread counts, the thread.
DECLARE
    i record;
    at_work runs%ROWTYPE;
    first bigint;
    sent bigint;
BEGIN
    PERFORM set_config('lock_timeout', CASE WHEN alone THEN '8s' ELSE '500ms' END, true);
    <<next_item>>
    FOR i IN SELECT * FROM jsonb_to_recordset(items) AS x (
        run uuid, fence bigint, upstream_thread text, intent uuid,
        -- seeded: the upstream thread was created with the transcript. carried_users: how many of
        -- the user's messages of the previous thread it begins with.
        seeded boolean, carried_users integer,
        -- orphan: id for the row of the upstream thread that the thread had before.
        orphan uuid
    ) LOOP
        -- The lock keeps other replicas from taking the run over between the check and the write.
        IF alone THEN
            SELECT r.* INTO at_work FROM runs r WHERE {leased_by i} AND {at_work r}
            FOR SHARE;
        ELSE
            SELECT r.* INTO at_work FROM runs r JOIN threads t ON t.id = r.thread_id WHERE {leased_by i} AND {at_work r}
            FOR SHARE OF r SKIP LOCKED FOR NO KEY UPDATE OF t SKIP LOCKED;
        END IF;
        IF at_work.id IS NULL THEN
            IF EXISTS (SELECT FROM runs r WHERE {leased_by i} AND {at_work r}) THEN
                outcome := 'held';
                RETURN NEXT;
                CONTINUE next_item;
            END IF;
            -- The upstream thread becomes an orphan that is to be deleted.
            UPDATE upstream_orphans o SET upstream_id = i.upstream_thread, due_at = clock_timestamp() WHERE o.id = i.intent;
            -- A separate statement: it must see the commits of an earlier call, or of a deletion
            -- that went first.
            outcome := CASE WHEN {has_recorded i} THEN 'lost' ELSE 'unrecorded' END;
            RETURN NEXT;
            CONTINUE next_item;
        END IF;
        DELETE FROM upstream_orphans o WHERE o.id = i.intent;
        sent := 0;
        IF i.seeded THEN
            first := {first_position at_work};
            -- Missing messages are updated separately, because the thread counts them.
            UPDATE messages m SET upstream_sync = 'present', upstream_message_id = NULL
            WHERE m.thread_id = at_work.thread_id AND m.position < first AND m.upstream_sync = 'missing';
            GET DIAGNOSTICS sent = ROW_COUNT;
            UPDATE messages m SET upstream_message_id = NULL,
                upstream_sync = CASE WHEN m.upstream_sync = 'unknown' THEN 'present' ELSE m.upstream_sync END
            WHERE m.thread_id = at_work.thread_id AND m.position < first
                AND (m.upstream_sync = 'unknown' OR m.upstream_message_id IS NOT NULL);
            INSERT INTO upstream_orphans (id, thread_id, upstream, kind, upstream_id, due_at)
            SELECT i.orphan, t.id, t.upstream, 'thread', t.upstream_thread_id, clock_timestamp() FROM threads t
            WHERE t.id = at_work.thread_id AND t.upstream_thread_id <> i.upstream_thread;
        END IF;
        UPDATE threads t SET upstream_thread_id = i.upstream_thread,
            unsynced_messages = t.unsynced_messages - sent,
            unsettled_run = CASE WHEN NOT i.seeded THEN t.unsettled_run END,
            carried_user_messages = CASE WHEN i.seeded THEN i.carried_users ELSE t.carried_user_messages END
        WHERE t.id = at_work.thread_id;
        outcome := 'bound';
        RETURN NEXT;
    END LOOP;
END
