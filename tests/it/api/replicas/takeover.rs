//! SIGKILL in the middle of a reply: another replica continues it, and serves its readers.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{
    Half, SCOPE, SHORT, TTL, assert_ascending, begin, completed, counted, outputs, run_of,
    user_messages,
};
use crate::support::gateway::{Answer, Gateway, PATIENCE, text, text_of};
use crate::support::history::{assert_same, upstream};
use crate::support::scene::Scene;

/// Promised time of a takeover beyond the session's life.
const PROMISED: Duration = Duration::from_secs(2);
/// Extra time on a machine that runs other tests. The promise has room itself: a killed owner's
/// session lapses after `TTL` at most, and others look every 300 ms.
const BUSY: Duration = Duration::from_secs(2);

/// What the database knew of the upstream run when its owner was killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Known {
    Id,
    Nothing,
}

/// The end of the run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fate {
    /// Its reader sees the whole reply.
    Whole,
    /// The upstream does not know the run, or stopped it with its client. It ends with what was
    /// recorded.
    Lost,
    /// Either of the two, as the upstream conversation shows.
    Either,
}

/// Makes a test for each protocol, with or without background.
macro_rules! kills {
    ($($module:ident $protocol:ident $upstream:literal [$($name:ident $known:ident $fate:ident),+])+) => {
        $(mod $module {
            use super::{Fate, Known};
            use crate::support::scene::{Backend, Protocol, Scene};
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    let scene = Scene::new(Protocol::$protocol, Backend::Postgres).await;
                    super::killed_half_way(scene, $upstream, Known::$known, Fate::$fate).await;
                }
            )+
        })+
    };
}

kills! {
    assistants Assistants "" [kill_with_upstream_id_recorded_keeps_every_message Id Whole, kill_without_upstream_record_keeps_every_message Nothing Whole]
    responses Responses "" [kill_with_upstream_id_recorded_keeps_every_message Id Lost, kill_without_upstream_record_keeps_every_message Nothing Either]
    responses_background Responses "background = true\n" [kill_with_upstream_id_recorded_keeps_every_message Id Whole, kill_without_upstream_record_keeps_every_message Nothing Either]
    chain Chain "" [kill_with_upstream_id_recorded_keeps_every_message Id Lost, kill_without_upstream_record_keeps_every_message Nothing Lost]
    chain_background Chain "background = true\n" [kill_with_upstream_id_recorded_keeps_every_message Id Whole, kill_without_upstream_record_keeps_every_message Nothing Lost]
}

/// Makes the database refuse a run's events, as if the owner had been killed before it could
/// write them.
async fn record_nothing(scene: &Scene) {
    let refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'nothing is recorded now'; END $$;
        CREATE TRIGGER no_events BEFORE INSERT ON run_events FOR EACH ROW EXECUTE FUNCTION refuse();
        CREATE TRIGGER no_upstream BEFORE UPDATE ON runs FOR EACH ROW
            WHEN (OLD.upstream_run_id IS DISTINCT FROM NEW.upstream_run_id) EXECUTE FUNCTION refuse()";
    scene.database.execute(refuse).await;
}

async fn record_again(scene: &Scene) {
    scene
        .database
        .execute("DROP TRIGGER no_events ON run_events; DROP TRIGGER no_upstream ON runs")
        .await;
}

async fn killed_half_way(scene: Scene, upstream: &str, known: Known, fate: Fate) {
    // A background response that no list shows is waited for, so the window is long. For one that
    // has stopped the wait would be in vain.
    let window = if upstream.is_empty() { "500ms" } else { "20s" };
    let upstream = format!("lock_window = \"{window}\"\n{upstream}");
    let start = || scene.gateway_both(SHORT, &upstream);
    let (owner, other) = tokio::join!(start(), start());
    owner.say(SCOPE, "hello").await;
    if known == Known::Nothing {
        record_nothing(&scene).await;
    }
    let half = Half::at(&scene, &owner, "tell me").await;
    let mut follower = other.events(SCOPE, &half.run, None).await;
    let mut elsewhere = Vec::new();
    if known == Known::Id {
        // Other replicas have seen these events, so they are recorded.
        elsewhere = follower.until_text(&half.text()).await;
    }
    let (in_line, _) = begin(&owner, "enqueue", "me too").await;
    let (last, _) = begin(&other, "enqueue", "me last").await;
    owner.kill();
    let killed = Instant::now();
    if known == Known::Nothing {
        record_again(&scene).await;
    }
    assert_eq!(
        half.stream.until_broken().await,
        [],
        "the stream does not end before the run"
    );
    drop(in_line);
    // The reader reconnects before any replica has noticed the kill.
    let resumed = other
        .events(
            SCOPE,
            &half.run,
            Some(half.seen.last().map_or("", |event| &event.id)),
        )
        .await;
    counted(
        &scene,
        "SELECT count(*) FROM runs WHERE fence > 1 AND seq IN (2, 3)",
        2,
    )
    .await;
    let took = killed.elapsed();
    assert!(took < TTL + PROMISED + BUSY, "taken over after {took:?}");
    scene.simulator.release();

    let (resumed, more, last) = tokio::join!(resumed.rest(), follower.rest(), last.rest());
    elsewhere.extend(more);
    let shown = [half.seen, resumed].concat();
    assert_ascending(&shown);
    assert_ascending(&elsewhere);
    assert_eq!(elsewhere.last(), shown.last(), "both streams end alike");
    let end = shown.last().unwrap();
    let fate = match fate {
        Fate::Either if end.name == "run.completed" => Fate::Whole,
        Fate::Either => Fate::Lost,
        fate => fate,
    };
    match fate {
        Fate::Whole => {
            assert_eq!(end.name, "run.completed", "{end:#?}");
            assert_eq!(
                text_of(&shown),
                completed(&shown),
                "both parts give the whole reply"
            );
            assert_eq!(text_of(&elsewhere), completed(&shown));
        }
        Fate::Lost | Fate::Either => {
            assert_eq!(
                (end.name.as_str(), &end.data["run"]["error"]["code"]),
                ("run.failed", &Value::from("replica_lost"))
            );
            if known == Known::Id {
                assert_eq!(
                    text_of(&shown),
                    completed(&shown),
                    "the text before the kill stays"
                );
                assert_eq!(text_of(&elsewhere), completed(&shown));
            }
        }
    }
    assert_eq!(last.last().unwrap().name, "run.completed");
    is_whole(&scene, &other, fate).await;
}

/// Checks that each message ran once and in its place, that the thread is usable, and that
/// transcript and upstream are the same.
async fn is_whole(scene: &Scene, gateway: &Gateway, fate: Fate) {
    let answer = gateway.say(SCOPE, "and now?").await;
    assert!(text(&answer["message"]).contains("and now?"));
    let said = ["hello", "tell me", "me too", "me last", "and now?"];
    assert_eq!(user_messages(gateway, SCOPE).await, said);
    let runs = gateway.get(&format!("{SCOPE}/runs?order=asc")).await.ok();
    let statuses: Vec<_> = runs["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run["status"].as_str().unwrap())
        .collect();
    let second = if fate == Fate::Whole {
        "completed"
    } else {
        "failed"
    };
    assert_eq!(
        statuses,
        ["completed", second, "completed", "completed", "completed"]
    );
    for said in said {
        let there = upstream(scene, gateway, SCOPE).await.into_iter();
        let times = there
            .filter(|(role, text)| role == "user" && text.split(" [[").next() == Some(said))
            .count();
        // A lost run may have left nothing upstream.
        assert!(
            times == 1 || (times == 0 && fate == Fate::Lost && said == "tell me"),
            "{times} times `{said}`"
        );
    }
    assert_same(scene, gateway, SCOPE).await;
    assert_eq!(
        scene.simulator.stats().active_runs,
        0,
        "the upstream has no active run"
    );
}

/// A dead replica's run can be followed at the replica that continues it, also by a new reader.
#[tokio::test(flavor = "multi_thread")]
async fn run_survives_repeated_takeovers() {
    use crate::support::scene::{Backend, Protocol};
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let upstream = "lock_window = \"20s\"\nbackground = true\n";
    let mut owner = scene.gateway_both(SHORT, upstream).await;
    let half = Half::at(&scene, &owner, "tell me").await;
    let mut shown = half.seen.clone();
    for round in 1..=2 {
        let next = scene.gateway_both(SHORT, upstream).await;
        let mut follower = next.events(SCOPE, &half.run, None).await;
        assert_eq!(
            text_of(&follower.until_text(&half.text()).await),
            half.text(),
            "round {round}"
        );
        std::mem::replace(&mut owner, next).kill();
        let taken = format!("SELECT count(*) FROM runs WHERE fence = {}", round + 1);
        counted(&scene, &taken, 1).await;
    }
    let resumed = owner.events(SCOPE, &half.run, Some(half.last())).await;
    scene.simulator.release();
    shown.extend(resumed.rest().await);
    assert_ascending(&shown);
    assert_eq!(text_of(&shown), completed(&shown));
    assert_eq!(run_of(&shown[0]), half.run);
    assert_same(&scene, &owner, SCOPE).await;
}

/// A process that is frozen just after its request keeps the connection open. So the upstream
/// continues, and shows the run only once it has ended. The replica that sends the message again
/// meets the lock.
#[tokio::test(flavor = "multi_thread")]
async fn message_still_running_upstream_is_not_duplicated_by_takeover() {
    use crate::support::scene::{Backend, Protocol};
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let start = || scene.gateway_both(SHORT, "lock_window = \"500ms\"\n");
    let (sleeper, other) = tokio::join!(start(), start());
    sleeper.say(SCOPE, "hello").await;
    record_nothing(&scene).await;
    let half = Half::at(&scene, &sleeper, "tell me").await;
    sleeper.freeze();
    record_again(&scene).await;
    let follower = other.events(SCOPE, &half.run, None).await;
    let refused = scene.simulator.wait_for(|stats| stats.lock_refusals > 0);
    tokio::time::timeout(PATIENCE, refused)
        .await
        .expect("the message is sent again");
    scene.simulator.release();
    let told = follower.rest().await;
    assert_eq!(told.last().unwrap().name, "run.completed");
    assert_eq!(text_of(&told), completed(&told));
    sleeper.thaw();
    assert_eq!(
        half.stream.rest().await.last(),
        told.last(),
        "both replicas show the same end"
    );
    other.say(SCOPE, "and now?").await;
    let there = upstream(&scene, &other, SCOPE).await.into_iter();
    let times = there
        .filter(|(role, text)| role == "user" && text.starts_with("tell me"))
        .count();
    assert_eq!(times, 1);
    assert_same(&scene, &other, SCOPE).await;
}

/// Nothing of the run was recorded, not even its start. The takeover only has to end it.
#[tokio::test(flavor = "multi_thread")]
async fn takeover_of_cancelling_run_delivers_unseen_text() {
    use crate::support::scene::{Backend, Protocol};
    let scene = Scene::new(Protocol::Assistants, Backend::Postgres).await;
    let start = || scene.gateway_both(SHORT, "");
    let (owner, other) = tokio::join!(start(), start());
    owner.say(SCOPE, "hello").await;
    record_nothing(&scene).await;
    let half = Half::at(&scene, &owner, "tell me").await;
    owner.freeze();
    let path = format!("{SCOPE}/runs/{}/cancel", half.run);
    let stopping = other.post_in_background(&path, &json!({}));
    counted(
        &scene,
        "SELECT count(*) FROM runs WHERE status = 'cancelling'",
        1,
    )
    .await;
    owner.kill();
    record_again(&scene).await;
    // The reader had seen only the beginning.
    let seen = half
        .seen
        .iter()
        .find(|event| event.name == "message.delta")
        .unwrap();
    let rest = other
        .events(SCOPE, &half.run, Some(&seen.id))
        .await
        .rest()
        .await;
    stopping.join_all().await;
    assert_eq!(rest.last().unwrap().name, "run.cancelled", "{rest:#?}");
    let shown = text_of(std::slice::from_ref(seen)) + &text_of(&rest);
    assert_eq!(shown, completed(&rest));
    assert_same(&scene, &other, SCOPE).await;
}

/// For a background response whose id was not recorded, the conversation shows its function
/// calls.
#[tokio::test(flavor = "multi_thread")]
async fn takeover_finds_tool_calls_of_unrecorded_response() {
    use crate::support::scene::{Backend, Protocol};
    let scene = Scene::new(Protocol::Responses, Backend::Postgres).await;
    let start = || scene.gateway_both(SHORT, "lock_window = \"20s\"\nbackground = true\n");
    let (owner, other) = tokio::join!(start(), start());
    owner.say(SCOPE, "hello").await;
    record_nothing(&scene).await;
    scene.simulator.hold();
    let (_stream, first) = begin(&owner, "enqueue", "weather? [[sim: tool=get_weather]]").await;
    scene
        .simulator
        .wait_for(|stats| stats.active_runs == 1)
        .await;
    owner.kill();
    record_again(&scene).await;
    scene.simulator.release();
    let path = format!("{SCOPE}/runs/{}", run_of(&first));
    let asks = |answer: &Answer| answer.body["run"]["required_action"].is_object();
    let asked = other.until(&path, asks).await.ok();
    let (path, body) = outputs(SCOPE, &asked);
    let answer = other.post(&path, &body).await.ok();
    assert_eq!(answer["run"]["status"], "completed", "{answer:#}");
    assert_same(&scene, &other, SCOPE).await;
}
