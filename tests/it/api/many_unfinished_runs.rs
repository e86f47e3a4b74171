//! The cost of a run while other live replicas have many unfinished runs.

use crate::support::scene::{Backend, Protocol, Scene};

const SCOPE: &str = "/v1/users/alice";
const OTHERS: i64 = 2000;
const TURNS: i64 = 20;
/// Most index entries that one run may read, including reads of the replica's background work in
/// that time.
const MOST: i64 = 100;

#[tokio::test(flavor = "multi_thread")]
async fn run_cost_is_independent_of_unfinished_runs_elsewhere() {
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    scene.gateway().await.say(SCOPE, "hello").await;
    // These statistics describe a quiet time, so the server plans for one.
    scene.database.execute("ANALYZE").await;
    let mut gateway = scene.gateway().await;
    for _ in 0..TURNS {
        gateway.say(SCOPE, "hello").await;
    }
    let others = format!(
        "INSERT INTO replicas (id, address, expires_at) \
         VALUES ('00000000-0000-7000-8000-000000000001', 'x', now() + interval '1 hour'); \
         INSERT INTO threads (id, tenant, user_key, scope_kind, scope_name, upstream, lifecycle, run_count, created_at, \
         last_active_at) \
         SELECT gen_random_uuid(), 'default', 'other-' || n, 'user', '', 'simulated', 'current', 1, now(), now() \
         FROM generate_series(1, {OTHERS}) n; \
         INSERT INTO runs (id, thread_id, seq, status, strategy, assistant, owner, fence, timeout_ms, created_at, \
         started_at, deadline_at) \
         SELECT gen_random_uuid(), id, 1, 'in_progress', 'enqueue', 'default', '00000000-0000-7000-8000-000000000001', \
         1, 3600000, now(), now(), now() + interval '1 hour' FROM threads WHERE user_key LIKE 'other-%'"
    );
    scene.database.execute(&others).await;
    for _ in 0..TURNS {
        gateway.say(SCOPE, "hello").await;
    }
    // Connections report their reads to the server when they end.
    gateway.terminate();
    assert!(gateway.exit().await.success());
    let read = "SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes WHERE relname = 'runs'";
    let read = scene.database.number(read).await;
    assert!(
        read > 0 && read <= 2 * TURNS * MOST,
        "{read} entries in {} runs",
        2 * TURNS
    );
    let scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'runs'";
    assert_eq!(scene.database.number(scans).await, 0);
}
