//! Expiry of threads.

use threadkeeper::domain::{Lifecycle, Lifetimes, NewLife, Timestamp, Ttl};
use threadkeeper::store::ThreadUpdate;

use super::*;

on_every_backend!(
    database_and_domain_agree_on_expiry,
    new_thread_is_due_at_expiry,
    own_limits_override_configured_limits,
    idle_expiry_counts_from_last_message,
    message_ttl_sets_thread_expiry,
    merged_message_ttl_sets_thread_expiry,
    refused_message_ttl_changes_nothing,
    merge_never_joins_run_of_expired_thread,
    expired_thread_is_archived_and_due,
    new_thread_links_newest_archived_thread,
    update_changes_only_given_fields,
    update_sets_or_resets_thread_expiry,
    expired_thread_is_not_updated,
);

const HOUR: Duration = Duration::from_hours(1);
const MINUTE: Duration = Duration::from_mins(1);

fn idle(max_idle: Duration) -> Limits {
    Limits {
        max_age: None,
        max_idle: Some(max_idle),
    }
}

fn within(limits: Limits, key: &ConversationKey) -> Admission {
    Admission {
        limits,
        ..admission(key)
    }
}

async fn talk(store: &Store, request: Admission) -> Thread {
    let turn = started(store.admit(request.clone()).await.unwrap());
    closed(store.finish(&turn.lease, completed(None)).await.unwrap());
    turn.thread
}

async fn thread(store: &Store, key: &ConversationKey) -> Thread {
    newest_thread(store, key).await.unwrap().0
}

/// Asserts that two times are equal, except for the time between two reads of the clock.
#[track_caller]
fn close_to(one: Option<Timestamp>, other: Timestamp) {
    let off = (one.unwrap() - other).abs();
    assert!(
        off <= chrono::TimeDelta::seconds(2),
        "{one:?} is not close to {other}"
    );
}

/// Moves the end of a thread across the present in steps of a millisecond, and looks which thread
/// gets the next message. By the database's own times, an expired thread must never get it, and a
/// fresh thread never too early.
async fn database_and_domain_agree_on_expiry(database: &TestDatabase, store: &Store) {
    let ms = Duration::from_millis;
    let (mut kept, mut replaced) = (0, 0);
    // The limits of the thread and of the configuration, in milliseconds.
    for (case, (own_age, own_idle, age, idle)) in [
        (None, None, Some(40_000), None),
        (None, None, None, Some(30_000)),
        (None, None, Some(40_000), Some(60_000)),
        (None, None, Some(90_000), Some(30_000)),
        (Some(40_000), None, None, None),
        (Some(40_000), None, Some(1), Some(1)),
        (None, Some(30_000), Some(1), Some(1)),
        (Some(90_000), Some(30_000), None, Some(1)),
        (Some(40_000), Some(70_000), Some(70_000), None),
        (None, None, None, None),
        (Some(90_000), None, Some(1), None),
    ]
    .into_iter()
    .enumerate()
    {
        let configured = Limits {
            max_age: age.map(ms),
            max_idle: idle.map(ms),
        };
        let lifetimes = Lifetimes {
            sessions: Limits::NONE,
            others: configured,
        };
        for step in 0..12 {
            let name = format!("u{case}-{step}");
            let key = user(&name);
            let old = talk(store, admission(&key)).await;
            let number =
                |limit: Option<u64>| limit.map_or("NULL".to_owned(), |limit| limit.to_string());
            let own = format!(
                "UPDATE threads SET max_age_ms = {}, max_idle_ms = {} WHERE user_key = '{name}'",
                number(own_age),
                number(own_idle),
            );
            database.execute(&own).await;
            // The first threads have expired by then, however fast this machine is.
            database
                .date_threads(&name, ms(40_004 - 2 * step), ms(30_004 - 2 * step))
                .await;
            let end = lifetimes.expiry(&thread(store, &key).await);
            let turn = started(store.admit(within(configured, &key)).await.unwrap());
            if turn.thread.id == old.id {
                kept += 1;
                // The time is written a moment after the check.
                let used = turn.thread.last_active_at - chrono::TimeDelta::milliseconds(1);
                assert!(end.is_none_or(|end| end > used), "{case}: {end:?} {used}");
            } else {
                replaced += 1;
                assert!(
                    end.unwrap() <= turn.thread.created_at,
                    "{case}: {end:?} {:?}",
                    turn.thread
                );
            }
        }
    }
    assert!(kept > 10 && replaced > 10, "{kept} {replaced}");
    check_invariants(database).await;
}

async fn new_thread_is_due_at_expiry(database: &TestDatabase, store: &Store) {
    let (both, later) = (
        Limits {
            max_age: Some(HOUR),
            max_idle: Some(MINUTE),
        },
        Limits {
            max_age: Some(MINUTE),
            max_idle: Some(HOUR),
        },
    );
    for (n, limits) in [Limits::NONE, limits(HOUR), idle(HOUR), both, later]
        .into_iter()
        .enumerate()
    {
        let key = user(&n.to_string());
        let thread = talk(store, within(limits, &key)).await;
        assert_eq!(
            thread.limits,
            Limits::NONE,
            "the configured limits are not copied"
        );
        let end = limits.end(thread.created_at, thread.created_at);
        assert_eq!(database.due_at(key.user.as_str()).await, end);
    }
}

async fn own_limits_override_configured_limits(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let old = talk(store, within(limits(MINUTE), &key)).await;
    database
        .execute("UPDATE threads SET max_idle_ms = 7200000")
        .await;
    database.age_threads(HOUR).await;
    assert_eq!(
        talk(store, within(limits(MINUTE), &key)).await.id,
        old.id,
        "the thread's age does not matter"
    );
    database.age_threads(2 * HOUR).await;
    assert_ne!(talk(store, within(Limits::NONE, &key)).await.id, old.id);
}

async fn idle_expiry_counts_from_last_message(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let old = talk(store, within(idle(HOUR), &key)).await;
    for _ in 0..3 {
        database.age_threads(HOUR / 2).await;
        assert_eq!(talk(store, within(idle(HOUR), &key)).await.id, old.id);
    }
    database.age_threads(HOUR).await;
    let fresh = talk(store, within(idle(HOUR), &key)).await;
    assert_eq!(fresh.previous_thread, Some(old.id));
}

async fn message_ttl_sets_thread_expiry(database: &TestDatabase, store: &Store) {
    let key = session("alice", "s1");
    let none = Lifetimes::default();
    let with = |ttl| Admission {
        ttl: Some(ttl),
        ..within(limits(MINUTE), &key)
    };
    // The TTL counts from the first message.
    let old = talk(store, with(Ttl::FromNow(HOUR))).await;
    assert_eq!(old.limits, limits(HOUR));
    assert_eq!(none.expiry(&old), database.due_at("alice").await);

    // The TTL counts from a later message. The thread is older by then.
    database.age_threads(HOUR / 2).await;
    let same = talk(store, with(Ttl::FromNow(HOUR))).await;
    assert_eq!((same.id, same.limits.max_idle), (old.id, None));
    close_to(none.expiry(&same), same.last_active_at + HOUR);
    close_to(database.due_at("alice").await, same.last_active_at + HOUR);

    // A message without a TTL changes nothing.
    let before = database.due_at("alice").await;
    let again = talk(store, within(limits(MINUTE), &key)).await;
    assert_eq!(
        (again.limits, database.due_at("alice").await),
        (same.limits, before)
    );

    let same = talk(store, with(Ttl::FromLastActivity(MINUTE))).await;
    assert_eq!((same.id, same.limits), (old.id, idle(MINUTE)));
    close_to(database.due_at("alice").await, same.last_active_at + MINUTE);

    // An expired thread is not revived.
    database.age_threads(MINUTE).await;
    let fresh = talk(store, with(Ttl::FromLastActivity(HOUR))).await;
    assert_eq!(
        (fresh.previous_thread, fresh.limits),
        (Some(old.id), idle(HOUR))
    );
    assert_eq!(none.expiry(&fresh), database.due_at("alice").await);
}

async fn merged_message_ttl_sets_thread_expiry(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    started(store.admit(admission(&key)).await.unwrap());
    queued(store.admit(admission(&key)).await.unwrap());
    assert_eq!(database.due_at("alice").await, None);
    let strategy = MultitaskStrategy::Merge;
    let merge = Admission {
        strategy,
        ttl: Some(Ttl::FromNow(HOUR)),
        ..admission(&key)
    };
    let Admitted::Merged { thread, .. } = store.admit(merge.clone()).await.unwrap() else {
        panic!("the message was not merged")
    };
    close_to(
        Lifetimes::default().expiry(&thread),
        thread.last_active_at + HOUR,
    );
    close_to(database.due_at("alice").await, thread.last_active_at + HOUR);
}

async fn refused_message_ttl_changes_nothing(_: &TestDatabase, store: &Store) {
    let key = user("alice");
    started(store.admit(admission(&key)).await.unwrap());
    let before = newest_thread(store, &key).await;
    let ttl = Some(Ttl::FromNow(MINUTE));
    let reject = Admission {
        strategy: MultitaskStrategy::Reject,
        ttl,
        ..admission(&key)
    };
    assert_eq!(store.admit(reject.clone()).await.unwrap(), Admitted::Busy);
    let other = Admission {
        upstream: "spare".to_owned(),
        ttl,
        ..admission(&key)
    };
    assert_eq!(
        store.admit(other.clone()).await.unwrap(),
        Admitted::OtherUpstream("main".to_owned())
    );
    assert_eq!(newest_thread(store, &key).await, before);
}

async fn merge_never_joins_run_of_expired_thread(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let old = started(store.admit(admission(&key)).await.unwrap()).thread;
    queued(store.admit(admission(&key)).await.unwrap());
    database.age_threads(HOUR).await;
    let merge = Admission {
        strategy: MultitaskStrategy::Merge,
        ..within(idle(HOUR), &key)
    };
    let fresh = started(store.admit(merge.clone()).await.unwrap()).thread;
    assert_eq!(fresh.previous_thread, Some(old.id));
    check_invariants(database).await;
}

async fn expired_thread_is_archived_and_due(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let old = talk(store, admission(&key)).await;
    database.age_threads(HOUR).await;
    let fresh = talk(store, within(limits(HOUR), &key)).await;
    let report = store
        .report(ThreadName::Id(&key.tenant, old.id))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (report.thread.lifecycle, report.next_thread),
        (Lifecycle::Archived, Some(fresh.id))
    );
    close_to(report.thread.archived_at, fresh.created_at);
    let due = "SELECT count(*) FROM threads WHERE lifecycle = 'archived' AND due_at = archived_at";
    assert_eq!(database.number(due).await, 1);
}

async fn new_thread_links_newest_archived_thread(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    talk(store, admission(&key)).await;
    database.archive_threads().await;
    talk(store, admission(&user("bob"))).await;
    let second = talk(store, admission(&key)).await;
    database.archive_threads().await;
    let third = talk(store, admission(&key)).await;
    assert_eq!(third.previous_thread, Some(second.id));
    assert_eq!(
        talk(store, admission(&key)).await.previous_thread,
        Some(second.id)
    );

    // A thread that is being deleted is not linked.
    let deletion = format!(
        "UPDATE threads SET lifecycle = 'deleting', deletion = 'erase' WHERE created_at >= \
         (SELECT t.created_at FROM threads t WHERE t.user_key = 'alice' AND t.lifecycle = 'current') \
         AND user_key = '{}'",
        key.user.as_str()
    );
    database.execute(&deletion).await;
    assert_eq!(
        talk(store, admission(&key)).await.previous_thread,
        Some(second.id)
    );
    check_invariants(database).await;
}

async fn update_changes_only_given_fields(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let update = |metadata, life| ThreadUpdate {
        metadata,
        life,
        limits: limits(HOUR),
    };
    let pairs = metadata(&[("plan", "gold")]);
    assert_eq!(
        store
            .update_thread(&key, &update(Some(pairs.clone()), None))
            .await
            .unwrap(),
        None
    );

    let before = talk(store, within(limits(HOUR), &key)).await;
    let due = database.due_at("alice").await;
    let changed = store
        .update_thread(&key, &update(Some(pairs.clone()), None))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(changed, thread(store, &key).await);
    assert_eq!(changed.metadata, pairs);
    assert_eq!(
        (changed.limits, database.due_at("alice").await),
        (Limits::NONE, due)
    );

    let same = store
        .update_thread(&key, &update(None, None))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(same, changed, "the update has no fields");
    assert_eq!(same.id, before.id);
    let cleared = update(Some(Metadata::default()), None);
    assert_eq!(
        store
            .update_thread(&key, &cleared)
            .await
            .unwrap()
            .unwrap()
            .metadata,
        Metadata::default()
    );
}

async fn update_sets_or_resets_thread_expiry(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    let update = |life| ThreadUpdate {
        metadata: None,
        life: Some(life),
        limits: limits(HOUR),
    };
    talk(store, admission(&key)).await;
    database.age_threads(HOUR / 2).await;
    let active = thread(store, &key).await.last_active_at;
    let none = Lifetimes::default();

    let one = store
        .update_thread(&key, &update(NewLife::Own(Ttl::FromNow(HOUR))))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        one.last_active_at, active,
        "an update does not count as activity"
    );
    let due = database.due_at("alice").await.unwrap();
    close_to(none.expiry(&one), due);
    assert!(due - active >= chrono::TimeDelta::minutes(90));

    let two = store
        .update_thread(&key, &update(NewLife::Own(Ttl::FromLastActivity(HOUR))))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (two.limits, database.due_at("alice").await),
        (idle(HOUR), none.expiry(&two))
    );

    let three = store
        .update_thread(&key, &update(NewLife::AsConfigured))
        .await
        .unwrap()
        .unwrap();
    let configured = Lifetimes {
        others: limits(HOUR),
        ..none
    };
    assert_eq!(
        (three.limits, database.due_at("alice").await),
        (Limits::NONE, configured.expiry(&three))
    );

    let zero = update(NewLife::Own(Ttl::FromNow(Duration::ZERO)));
    store.update_thread(&key, &zero).await.unwrap().unwrap();
    // A part of a millisecond counts as a whole one.
    database.age_threads(Duration::from_millis(1)).await;
    assert_ne!(talk(store, admission(&key)).await.id, three.id);
}

async fn expired_thread_is_not_updated(database: &TestDatabase, store: &Store) {
    let key = user("alice");
    talk(store, within(limits(HOUR), &key)).await;
    database.age_threads(HOUR).await;
    let before = newest_thread(store, &key).await;
    let update = ThreadUpdate {
        life: Some(NewLife::Own(Ttl::FromNow(HOUR))),
        limits: limits(HOUR),
        metadata: None,
    };
    assert_eq!(store.update_thread(&key, &update).await.unwrap(), None);
    assert_eq!(newest_thread(store, &key).await, before);
}
