//! Reading a run's events again: from the start, or from where a reader stopped, during the run
//! and afterwards.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::gateway::{Event, EventReader, Gateway, PATIENCE, joined, text_of};
use crate::support::scene::{Backend, Scene, on_each_protocol, on_each_store, on_every_scene};

on_each_protocol!(
    reader_joins_run_in_progress,
    replayed_stream_shows_run_failure,
    run_on_another_replica_can_be_followed,
);
on_each_store!(
    stream_replays_from_any_event,
    event_log_of_completed_run_is_not_stored,
    event_log_kept_for_failed_incomplete_or_queued_runs,
    foreign_or_malformed_last_event_id_is_refused,
    unreadable_event_log_is_not_reported_as_end,
);
on_every_scene!(@ alone_on_sqlite Responses Sqlite [unfollowed_run_is_recorded_infrequently]);
on_every_scene!(@ alone_on_postgres Chain Postgres [unfollowed_run_is_recorded_infrequently]);
// The protocol does not affect slow readers, and this test takes long.
on_every_scene!(@ many_on_sqlite Assistants Sqlite [slow_readers_neither_stall_run_nor_grow_memory]);
on_every_scene!(@ many_on_postgres Responses Postgres [slow_readers_neither_stall_run_nor_grow_memory]);

const SCOPE: &str = "/v1/users/alice";

async fn open(gateway: &Gateway, run: &str, last: Option<&str>) -> reqwest::Response {
    let mut request = gateway.request(Method::GET, &format!("{SCOPE}/runs/{run}/events"));
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    request.send().await.unwrap()
}

async fn replay(gateway: &Gateway, run: &str, last: Option<&str>) -> Vec<Event> {
    EventReader::new(open(gateway, run, last).await)
        .rest()
        .await
}

fn run_of(event: &Event) -> String {
    event.data["run_id"].as_str().unwrap().to_owned()
}

async fn stream_replays_from_any_event(scene: Scene) {
    let gateway = scene.gateway().await;
    let original = gateway
        .stream(SCOPE, "tell me [[sim: tokens=30]]")
        .await
        .rest()
        .await;
    let run = run_of(&original[0]);
    assert_eq!(original.last().unwrap().name, "run.completed");
    let started = scene.simulator.stats().runs_started;
    // The first round reads in this process, the second in one that never saw the run.
    let mut gateway = gateway;
    for round in 0..2 {
        assert_eq!(
            joined(&replay(&gateway, &run, None).await),
            joined(&original),
            "round {round}"
        );
        for at in 0..original.len() - 1 {
            let rest = replay(&gateway, &run, Some(&original[at].id)).await;
            assert_eq!(
                joined(&rest),
                joined(&original[at + 1..]),
                "round {round}, after {at}"
            );
        }
        let over = open(&gateway, &run, Some(&original.last().unwrap().id)).await;
        assert_eq!(
            over.status(),
            StatusCode::NO_CONTENT,
            "the stream says that it has ended"
        );
        if round == 0 {
            gateway.kill();
            gateway = scene.gateway().await;
        }
    }
    assert_eq!(
        scene.simulator.stats().runs_started,
        started,
        "reading starts no run"
    );
}

async fn stored(scene: &Scene) -> i64 {
    scene
        .database
        .number("SELECT count(*) FROM run_events")
        .await
}

/// During a reply the log is stored, so that another replica could continue the run. After the
/// end the transcript suffices.
async fn event_log_of_completed_run_is_not_stored(scene: Scene) {
    let gateway = scene.gateway().await;
    gateway.stream(SCOPE, "quick").await.rest().await;
    assert_eq!(stored(&scene).await, 0);
    scene.simulator.hold();
    let mut stream = gateway
        .stream(SCOPE, "tell me [[sim: tokens=40 hold_after=20]]")
        .await;
    let mut original = stream.until_text("story").await;
    let start = std::time::Instant::now();
    while stored(&scene).await == 0 {
        assert!(start.elapsed() < PATIENCE, "the log was never stored");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    scene.simulator.release();
    original.extend(stream.rest().await);
    assert_eq!(stored(&scene).await, 0);

    // A write that was late leaves a part of the log: its beginning or a later part. Readers miss
    // nothing and read nothing twice.
    let run = run_of(&original[0]);
    let text = text_of(&original);
    drop(gateway);
    for (n, events, until) in [
        (1, format!("[{{\"started\":{{}}}},\"{}\"]", &text[..9]), 11),
        (11, format!("[\"{}\"]", &text[9..20]), 22),
    ] {
        let late = format!(
            "DELETE FROM run_events; INSERT INTO run_events (run_id, first_offset, events, end_offset) \
             SELECT id, {n}, '{events}', {until} FROM runs WHERE seq = 2"
        );
        scene.database.execute(&late).await;
        let gateway = scene.gateway().await;
        assert_eq!(
            joined(&replay(&gateway, &run, None).await),
            joined(&original),
            "with the stored part from {n} on"
        );
        for at in 0..original.len() - 1 {
            let rest = replay(&gateway, &run, Some(&original[at].id)).await;
            assert_eq!(
                joined(&rest),
                joined(&original[at + 1..]),
                "after {at}, with the stored part from {n} on"
            );
        }
    }
}

/// Without readers the log is written four times in the first 1.5 s, then once a second, however
/// slow the machine is.
async fn unfollowed_run_is_recorded_infrequently(scene: Scene) {
    let gateway = scene.gateway().await;
    scene.simulator.hold();
    let begun = std::time::Instant::now();
    let mut stream = gateway
        .stream(SCOPE, "tell me [[sim: tokens=80 rate=50ms hold_after=79]]")
        .await;
    let mut words = 0;
    while words < 79 {
        words += usize::from(stream.next().await.unwrap().name == "message.delta");
    }
    let (rows, most) = (stored(&scene).await, 4 + begun.elapsed().as_secs());
    assert!(
        rows > 0 && rows.unsigned_abs() <= most,
        "{rows} rows; the limit is {most}"
    );
    scene.simulator.release();
    stream.rest().await;
}

async fn event_log_kept_for_failed_incomplete_or_queued_runs(scene: Scene) {
    let gateway = scene.gateway().await;
    for content in ["oh [[sim: fail]]", "oh [[sim: incomplete]]"] {
        let before = stored(&scene).await;
        let original = gateway.stream(SCOPE, content).await.rest().await;
        assert!(stored(&scene).await > before, "{content}");
        assert_eq!(
            replay(&gateway, &run_of(&original[0]), None).await,
            original,
            "{content}"
        );
    }
    // The transcript does not say that this run was queued, so its log stays.
    scene.simulator.hold();
    let first = gateway.stream(SCOPE, "one").await;
    let mut second = gateway.stream(SCOPE, "two").await;
    let waits = second.next().await.unwrap();
    assert_eq!(waits.name, "run.queued");
    let before = stored(&scene).await;
    scene.simulator.release();
    first.rest().await;
    let original = [vec![waits], second.rest().await].concat();
    assert!(stored(&scene).await > before);
    drop(gateway);
    let gateway = scene.gateway().await;
    assert_eq!(
        replay(&gateway, &run_of(&original[0]), None).await,
        original
    );
}

async fn reader_joins_run_in_progress(scene: Scene) {
    let gateway = scene.gateway().await;
    let mut original = gateway
        .stream(SCOPE, "tell me [[sim: tokens=40 rate=10ms]]")
        .await;
    let mut seen = Vec::new();
    for _ in 0..6 {
        seen.push(original.next().await.unwrap());
    }
    let run = run_of(&seen[0]);
    let whole = EventReader::new(open(&gateway, &run, None).await);
    let later = EventReader::new(open(&gateway, &run, Some(&seen[5].id)).await);
    // The first reader leaves; the others continue.
    drop(original);
    let (whole, later) = tokio::join!(whole.rest(), later.rest());
    assert_eq!(whole.last().unwrap().name, "run.completed");
    assert_eq!(joined(&whole), joined(&[seen, later].concat()));
    assert_eq!(scene.simulator.stats().runs_started, 1);
}

async fn replayed_stream_shows_run_failure(scene: Scene) {
    let gateway = scene.gateway().await;
    for content in [
        "oh [[sim: fail]]",
        "oh [[sim: status=401]]",
        "oh [[sim: incomplete]]",
    ] {
        let original = gateway.stream(SCOPE, content).await.rest().await;
        assert_eq!(
            replay(&gateway, &run_of(&original[0]), None).await,
            original,
            "{content}"
        );
    }
}

async fn foreign_or_malformed_last_event_id_is_refused(scene: Scene) {
    let gateway = scene.gateway().await;
    let first = gateway.stream(SCOPE, "one").await.rest().await;
    let second = gateway.stream(SCOPE, "two").await.rest().await;
    let run = run_of(&second[0]);
    for last in [&*first[0].id, "nonsense", "run_1:x", &format!("{run}:-1")] {
        let request = gateway.request(Method::GET, &format!("{SCOPE}/runs/{run}/events"));
        let refused = gateway.send(request.header("last-event-id", last)).await;
        assert_eq!(refused.problem(), (400, "invalid-request"), "{last}");
    }
    for beyond in [i64::MAX.to_string(), "9".repeat(19)] {
        let told = open(&gateway, &run, Some(&format!("{run}:{beyond}"))).await;
        // The answer is the end alone or nothing, depending on the stored part of the log.
        assert!(told.status().is_success(), "{beyond}: {told:?}");
    }
    let unknown = gateway
        .get(&format!(
            "{SCOPE}/runs/run_0198f000000070008000000000000000/events"
        ))
        .await;
    assert_eq!(unknown.problem(), (404, "not-found"));
    let elsewhere = gateway
        .get(&format!("/v1/users/bob/runs/{run}/events"))
        .await;
    assert_eq!(elsewhere.problem(), (404, "not-found"));
}

async fn run_on_another_replica_can_be_followed(scene: Scene) {
    if scene.backend == Backend::Sqlite {
        return; // serves one process
    }
    let (gateway, other) = (scene.gateway().await, scene.gateway().await);
    scene.simulator.hold();
    let mut original = gateway.stream(SCOPE, "tell me").await;
    let first = original.next().await.unwrap();
    let run = run_of(&first);
    let follower = EventReader::new(open(&other, &run, None).await);
    scene.simulator.release();
    let (rest, seen) = tokio::join!(original.rest(), follower.rest());
    let whole: Vec<_> = std::iter::once(first).chain(rest).collect();
    assert_eq!(joined(&seen), joined(&whole));
}

async fn unreadable_event_log_is_not_reported_as_end(scene: Scene) {
    let gateway = scene.gateway().await;
    let original = gateway.stream(SCOPE, "tell me").await.rest().await;
    let run = run_of(&original[0]);
    let path = format!("{SCOPE}/runs/{run}/events");
    scene
        .database
        .execute("ALTER TABLE run_events RENAME TO run_events_away")
        .await;
    for last in [&original[0].id, &original.last().unwrap().id] {
        let request = gateway
            .request(Method::GET, &path)
            .header("last-event-id", last);
        let answer = gateway.send(request).await;
        assert_eq!(
            answer.problem().0,
            500,
            "a reader that is told of an end does not ask again"
        );
    }
    scene
        .database
        .execute("ALTER TABLE run_events_away RENAME TO run_events")
        .await;
    assert_eq!(
        joined(&replay(&gateway, &run, Some(&original[0].id)).await),
        joined(&original[1..])
    );
    let over = open(&gateway, &run, Some(&original.last().unwrap().id)).await;
    assert_eq!(over.status(), StatusCode::NO_CONTENT);
}

async fn slow_readers_neither_stall_run_nor_grow_memory(scene: Scene) {
    let gateway = scene.gateway().await;
    let mut readers = Vec::new();
    scene.simulator.hold();
    let original = gateway
        .stream(SCOPE, "tell me all [[sim: tokens=20000]]")
        .await;
    let runs = gateway.get(&format!("{SCOPE}/runs")).await.ok();
    let run = runs["data"][0]["id"].as_str().unwrap().to_owned();
    let before = resident(&gateway);
    for _ in 0..12 {
        // These clients send a request, and then read nothing.
        let mut socket = TcpStream::connect(gateway.address()).await.unwrap();
        let request = format!("GET {SCOPE}/runs/{run}/events HTTP/1.1\r\nhost: x\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut head = [0; 12];
        socket.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        readers.push(socket);
    }
    scene.simulator.release();
    let events = tokio::time::timeout(PATIENCE, original.rest())
        .await
        .unwrap();
    assert_eq!(events.last().unwrap().name, "run.completed");
    assert!(text_of(&events).split(' ').count() >= 20_000);
    let grown = resident(&gateway).saturating_sub(before);
    assert!(
        grown < 20 * 1024,
        "the process grew by {grown} KiB for 12 slow readers of one long reply"
    );
    gateway.say(SCOPE, "and now?").await;
    // A reader that reads again gets the rest.
    let mut late = readers.pop().unwrap();
    let mut text = String::new();
    let read = tokio::time::timeout(Duration::from_secs(20), async {
        let mut buffer = vec![0; 64 * 1024];
        while !text.contains("run.completed") {
            let n = late.read(&mut buffer).await.unwrap();
            assert!(n > 0, "the stream broke off");
            text.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    });
    read.await.expect("the rest of the reply arrives");
}

/// Returns the resident memory of the process in KiB.
fn resident(gateway: &Gateway) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.id())).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
