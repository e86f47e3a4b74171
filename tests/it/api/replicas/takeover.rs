//! kill -9 in the middle of a reply: another replica goes on with it, and its readers with that one.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{
    Half, SCOPE, SHORT, TTL, assert_ascending, begin, completed, counted, heard, outputs, run_of,
};
use crate::support::gateway::{Answer, Gateway, PATIENCE, text, text_of};
use crate::support::history::{assert_same, upstream};
use crate::support::scene::Scene;

/// What is promised: a dead replica's runs are taken over within its session's time and this.
const PROMISED: Duration = Duration::from_secs(2);
/// A machine that runs other tests as well may add so much. The promise itself has room: the session of an owner that was
/// killed lapses after `TTL` at the most, and others look every 300 ms.
const BUSY: Duration = Duration::from_secs(2);

/// What the database knew of the run at its upstream when its owner died.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Known {
    Id,
    Nothing,
}

/// What becomes of the run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fate {
    /// Its reader sees all of the reply.
    Whole,
    /// The upstream cannot tell, or has stopped with its client: it ends with what was recorded.
    Lost,
    /// One of both, by what a look at the conversation shows.
    Either,
}

/// Makes a test for each protocol, in the background or not.
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

/// Lets nothing be recorded of what a run shows, as if its owner had died before it could be.
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
    // A response in the background that is in no list is waited for; one that has stopped is not waited for in vain.
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
        // What others see is recorded.
        elsewhere = follower.until_told(&half.text()).await;
    }
    let (in_line, _) = begin(&owner, "enqueue", "me too").await;
    let (last, _) = begin(&other, "enqueue", "me last").await;
    owner.kill();
    let killed = Instant::now();
    if known == Known::Nothing {
        record_again(&scene).await;
    }
    assert_eq!(half.stream.until_broken().await, [], "no end that is none");
    drop(in_line);
    // Its reader comes back before anybody has noticed.
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
    assert_eq!(elsewhere.last(), shown.last(), "both end alike");
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
                "what came before and after is the whole reply"
            );
            assert_eq!(text_of(&elsewhere), completed(&shown));
        }
        Fate::Lost | Fate::Either => {
            assert_eq!(
                (end.name.as_str(), &end.data["run"]["error"]["code"]),
                ("run.failed", &Value::from("replica_lost"))
            );
            if known == Known::Id {
                assert_eq!(text_of(&shown), completed(&shown), "what was said stays");
                assert_eq!(text_of(&elsewhere), completed(&shown));
            }
        }
    }
    assert_eq!(last.last().unwrap().name, "run.completed");
    is_whole(&scene, &other, fate).await;
}

/// Each message has run once, in its place; the thread is usable, and the upstream knows what the transcript says.
async fn is_whole(scene: &Scene, gateway: &Gateway, fate: Fate) {
    let answer = gateway.say(SCOPE, "and now?").await;
    assert!(text(&answer["message"]).contains("and now?"));
    let said = ["hello", "tell me", "me too", "me last", "and now?"];
    assert_eq!(heard(gateway, SCOPE).await, said);
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
        // What was lost may have left nothing there.
        assert!(
            times == 1 || (times == 0 && fate == Fate::Lost && said == "tell me"),
            "{times} times `{said}`"
        );
    }
    assert_same(scene, gateway, SCOPE).await;
    assert_eq!(
        scene.simulator.stats().active_runs,
        0,
        "nothing goes on upstream"
    );
}

/// A run of a replica that died is followed where it goes on, also by who asks for it for the first time.
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
            text_of(&follower.until_told(&half.text()).await),
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

/// A process that is stopped right behind its request holds the connection, so the upstream works on, where nobody can
/// see it before it has ended. Whoever sends the message again meets the lock.
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
        .expect("it is sent again");
    scene.simulator.release();
    let told = follower.rest().await;
    assert_eq!(told.last().unwrap().name, "run.completed");
    assert_eq!(text_of(&told), completed(&told));
    sleeper.thaw();
    assert_eq!(
        half.stream.rest().await.last(),
        told.last(),
        "both tell the same end"
    );
    other.say(SCOPE, "and now?").await;
    let there = upstream(&scene, &other, SCOPE).await.into_iter();
    let times = there
        .filter(|(role, text)| role == "user" && text.starts_with("tell me"))
        .count();
    assert_eq!(times, 1);
    assert_same(&scene, &other, SCOPE).await;
}

/// Nothing of it was recorded, not even its start, and all that is left to do is to end it.
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
    // Its reader had seen the beginning alone.
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

/// Of a response in the background whose id nobody recorded the conversation shows what it asks for.
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
