//! The invariants that must hold once no fault is active and no work is left.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::Value;
use threadkeeper::domain::Timestamp;
use tokio::time::sleep;

use super::message::{Fate, Sent, Whim};
use super::seen::text_of;
use super::users::{Habit, User};
use super::world::{Teller, World};
use crate::support::gateway::Gateway;
use crate::support::history::{Line, all, joined, messages, transcript};

/// Longest time for the remaining work once all faults are over.
const QUIET: Duration = Duration::from_mins(2);
/// Name of the upstream tag with the id of a request's run.
const RUN_TAG: &str = "threadkeeper_run";
/// Number of each user's runs whose events are read a second time.
const READ_AGAIN: usize = 4;

/// Waits until neither the database nor the upstream has unfinished work.
pub(super) async fn quiet(world: &World) {
    let unfinished = "SELECT count(*) FROM runs WHERE finished_at IS NULL";
    let deleting = "SELECT count(*) FROM threads WHERE lifecycle = 'deleting'";
    let database = &world.scene.database;
    // Failed work is retried after a while. Work that a dead replica had leased waits for the end
    // of the lease. Both are due now.
    database.age_due_times(Duration::from_mins(5)).await;
    let begun = Instant::now();
    loop {
        let left = (
            database.number(unfinished).await,
            database.number(deleting).await,
        );
        let active = world.scene.simulator.stats().active_runs;
        if left == (0, 0) && active == 0 {
            return world.took("until all was quiet", begun.elapsed());
        }
        if begun.elapsed() > QUIET {
            let runs = "SELECT r.id || ' ' || r.status || ' ' || t.user_key || ' ' || COALESCE(p.address, 'nobody') \
                        FROM runs r JOIN threads t ON t.id = r.thread_id LEFT JOIN replicas p ON p.id = r.owner \
                        WHERE r.finished_at IS NULL";
            let runs = database.texts(runs).await;
            let what = format!(
                "unfinished runs and deletions {left:?}, active upstream {active}: {runs:#?}"
            );
            return world.fault(Teller::Nobody, what);
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Checks that transcript and upstream thread contain exactly a user's acknowledged messages.
pub(super) async fn user(world: &World, gateway: &Gateway, user: &User) {
    let scope = &user.talk.scope;
    let fault = |what: String| world.fault(Teller::User(user.number), what);
    let said = messages(gateway, scope).await;
    let thread = gateway.get(&format!("{scope}/thread")).await.ok();
    let upstream = thread["upstream_thread_id"].as_str().unwrap_or_default();
    let there = joined(world.scene.simulator.thread_history(upstream).into_iter());
    let here = transcript(gateway, scope).await;
    // After a rollover, the upstream thread begins with the last messages of the thread before.
    let is_same = if thread["previous_thread"].is_string() {
        there.ends_with(&here)
    } else {
        here == there
    };
    if !is_same {
        fault(format!(
            "transcript and upstream thread differ: {}",
            difference(&here, &there)
        ));
    }
    check_loss_is_told(world, gateway, user, &said).await;
    let mut last_place = 0;
    for sent in &user.sent {
        let run = match &sent.run {
            Some(run) => Some(gateway.get(&format!("{scope}/runs/{run}")).await.body),
            None => None,
        };
        let places: Vec<&Value> = said.iter().filter(|message| is_of(message, sent)).collect();
        let times = there
            .iter()
            .filter(|(role, text)| role == "user" && text.contains(&sent.plan.token))
            .count();
        let expected = expected(user, sent, run.as_ref());
        if !expected.contains(&places.len()) {
            fault(format!(
                "{} is {} times in the transcript, not {expected:?}: {:?}, {run:?}",
                sent.plan.token,
                places.len(),
                sent.fate
            ));
        }
        let known = places
            .iter()
            .filter(|message| message["visible_to_model"] == true)
            .count();
        let is_carried = thread["previous_thread"].is_string() && known == 0 && times == 1;
        if times != known && !is_carried {
            fault(format!(
                "{} is {times} times upstream, not {known}",
                sent.plan.token
            ));
        }
        if sent.is_erased(user.deletions()) {
            world.count("messages: erased");
            // A response that was cut off before its id arrived cannot be deleted by anybody. The
            // receipt of the deletion says so.
            let left = world.scene.simulator.holds_text(&sent.plan.token);
            let left: Vec<&String> = left
                .iter()
                .filter(|place| !place.contains("response"))
                .collect();
            if !left.is_empty() {
                fault(format!(
                    "{} was erased and is still upstream: {left:?}",
                    sent.plan.token
                ));
            }
        }
        if sent.fate == Fate::Unknown && !places.is_empty() {
            world.count("messages: unknown, and accepted");
        }
        let (Some(run), [message]) = (run, places.as_slice()) else {
            continue;
        };
        check_run(world, user, sent, &run, &said);
        let started = run["run"]["started_at"].is_string();
        if sent.fate == Fate::Acknowledged && user.habit.is_orderly() && started {
            let place = message["position"].as_i64().unwrap();
            if place <= last_place && sent.generation == user.deletions() {
                fault(format!(
                    "{} is not in the order in which it was acknowledged",
                    sent.plan.token
                ));
            }
            last_place = place;
        }
    }
    read_again(world, gateway, user).await;
}

/// Checks that a message of a completed run which the model does not know any more was left out by a
/// later run that says so.
async fn check_loss_is_told(world: &World, gateway: &Gateway, user: &User, said: &[Value]) {
    let runs = all(gateway, &format!("{}/runs", user.talk.scope)).await;
    let tells = |run: &Value| run["recovered"]["messages_left_out"].as_u64() > Some(0);
    let started_at =
        |run: &Value| -> Timestamp { run["started_at"].as_str().unwrap().parse().unwrap() };
    let last_told = runs.iter().filter(|run| tells(run)).map(started_at).max();
    if last_told.is_some() {
        world.count("users: lost a part of the model's memory");
    }
    for message in said {
        let run = runs.iter().find(|run| run["id"] == message["run_id"]);
        let completed = run.filter(|run| run["status"] == "completed");
        let is_hidden = message["visible_to_model"] == false;
        if is_hidden && completed.is_some_and(|run| Some(started_at(run)) >= last_told) {
            world.fault(
                Teller::User(user.number),
                format!("nobody told that the model lost this: {message}"),
            );
        }
    }
    let recovered = runs.iter().filter(|run| run["recovered"].is_object());
    world.add("runs: recovered", recovered.count());
}

fn is_of(message: &Value, sent: &Sent) -> bool {
    message["role"] == "user" && text_of(message).contains(&sent.plan.token)
}

/// Returns how many times a message may be in the transcript.
fn expected(user: &User, sent: &Sent, run: Option<&Value>) -> Vec<usize> {
    let mut expected = match sent.fate {
        // A hectic user does not wait, so an unanswered request may have arrived after the
        // deletion.
        _ if sent.generation < user.deletions()
            && sent.had_silence
            && user.habit == Habit::Hectic =>
        {
            vec![0, 1]
        }
        _ if sent.generation < user.deletions() => vec![0],
        Fate::Acknowledged => match run {
            Some(run) if run["run"]["rolled_back"] == true => vec![0],
            // The run was refused when it started: something else held the upstream thread.
            Some(run)
                if run["run"]["error"]["code"] == "upstream_busy"
                    && sent.plan.strategy == "reject" =>
            {
                vec![0]
            }
            // Whether another run rolled this one back is not known.
            None if !user.habit.is_orderly() => vec![0, 1],
            _ => vec![1],
        },
        Fate::Refused if sent.had_silence => vec![0, 1],
        Fate::Refused => vec![0],
        Fate::Unknown => vec![0, 1],
    };
    if user.talk.may_be_deleted {
        expected.push(0);
    }
    expected
}

/// Checks that the run is final, has one reply, and showed its text to its reader.
fn check_run(world: &World, user: &User, sent: &Sent, answer: &Value, said: &[Value]) {
    let (run, token) = (&answer["run"], &sent.plan.token);
    let fault = |what: String| world.fault(Teller::User(user.number), what);
    let status = run["status"].as_str().unwrap_or_default();
    let code = run["error"]["code"].as_str().unwrap_or_default();
    world.count(format!("runs: {status} {code}").trim_end());
    if !run["finished_at"].is_string() {
        fault(format!("{token}: its run never ended: {run}"));
    }
    let text = text_of(&answer["message"]);
    if status == "completed" {
        let replies = said
            .iter()
            .filter(|it| it["role"] == "assistant" && it["run_id"] == run["id"])
            .count();
        if replies != 1 {
            fault(format!("{token}: {replies} replies in the transcript"));
        }
        // A message that was merged into another's run gets that run's reply.
        if !text.contains(token) && user.habit.is_orderly() {
            fault(format!("{token}: the reply of another message: {text}"));
        }
    }
    let Some(seen) = &sent.seen else { return };
    if seen.end.as_deref() != Some(&*format!("run.{status}")) {
        fault(format!(
            "{token}: its reader saw the end {:?}, the run is {status}",
            seen.end
        ));
    }
    if status == "completed" && seen.message.as_deref() != Some(&text) {
        fault(format!(
            "{token}: its reader got the message {:?}, the transcript has {text:?}",
            seen.message
        ));
    }
    // A run that completed before its Stop may show the rest of its text only in its message.
    let is_whole = status == "completed" && !matches!(sent.plan.whim, Whim::Stops(_));
    if is_whole && seen.text != text {
        fault(format!(
            "{token}: its reader saw the text {:?}, the transcript has {text:?}",
            seen.text
        ));
    } else if !seen.text.starts_with(&text) && !text.starts_with(&seen.text) {
        fault(format!(
            "{token}: its reader saw the text {:?}, which is no part of {text:?}",
            seen.text
        ));
    }
}

/// Checks that a late reader sees the same events as the first one.
async fn read_again(world: &World, gateway: &Gateway, user: &User) {
    let followed = user
        .sent
        .iter()
        .rev()
        .filter(|sent| sent.generation == user.deletions());
    let followed = followed.filter_map(|sent| sent.seen.as_ref().map(|seen| (sent, seen)));
    for (sent, seen) in followed.take(READ_AGAIN) {
        let Some(run) = &seen.run else { continue };
        let response = gateway
            .open_events(&format!("{}/runs/{run}/events", user.talk.scope), None)
            .await;
        if response.status() != 200 {
            if !user.talk.may_be_deleted {
                world.fault(
                    Teller::User(user.number),
                    format!("{}: {}", sent.plan.token, response.status()),
                );
            }
            continue;
        }
        let mut late = super::seen::Seen::default();
        for event in crate::support::gateway::EventReader::new(response)
            .rest()
            .await
        {
            if let Err(why) = late.take(&event) {
                world.fault(
                    Teller::User(user.number),
                    format!("{}, read again: {why}", sent.plan.token),
                );
            }
        }
        let same_text = late.text == seen.text || late.end.as_deref() != Some("run.completed");
        if (&late.end, late.last) != (&seen.end, seen.last) || !same_text {
            let what = format!(
                "{}: read again it is {late:?}, it was {seen:?}",
                sent.plan.token
            );
            world.fault(Teller::User(user.number), what);
        }
    }
}

/// Returns the first line in which the two differ, with the lines around it.
fn difference(here: &[Line], there: &[Line]) -> String {
    let first = here
        .iter()
        .zip(there)
        .position(|(here, there)| here != there);
    let at = first.unwrap_or(here.len().min(there.len()));
    let around = |lines: &[Line]| {
        lines[at.saturating_sub(2).min(lines.len())..(at + 3).min(lines.len())].to_vec()
    };
    format!(
        "from line {at} on, here {:#?}, there {:#?}",
        around(here),
        around(there)
    )
}

/// Checks that the database has no rows without an owner, and the upstream no threads without a
/// name here.
pub(super) async fn nothing_left(world: &World, replicas: usize) {
    let database = &world.scene.database;
    // The janitor leaves an unacknowledged creation alone for ten minutes.
    database.age_due_times(Duration::from_mins(11)).await;
    let owed =
        "SELECT count(*) FROM upstream_orphans WHERE due_at IS NOT NULL OR upstream_id IS NULL";
    let named = "SELECT upstream_thread_id FROM threads WHERE upstream_thread_id IS NOT NULL";
    let begun = Instant::now();
    loop {
        let named: BTreeSet<String> = database.texts(named).await.into_iter().collect();
        let there: BTreeSet<String> = world.scene.upstream_threads().into_iter().collect();
        let owed = database.number(owed).await;
        if named == there && owed == 0 {
            world.took("until all upstream orphans were deleted", begun.elapsed());
            break;
        }
        if begun.elapsed() > QUIET {
            let nameless: Vec<_> = there.difference(&named).collect();
            let missing: Vec<_> = named.difference(&there).collect();
            let what = format!(
                "{owed} orphans; upstream threads without an owner {nameless:?}, missing {missing:?}"
            );
            world.fault(Teller::Nobody, what);
            break;
        }
        sleep(Duration::from_millis(200)).await;
    }
    let living = i64::try_from(replicas).unwrap();
    let none: [(&str, i64, &str); 8] = [
        (
            "live replicas",
            living,
            "SELECT count(*) FROM replicas WHERE expires_at > now()",
        ),
        (
            "messages that the upstream may lack",
            0,
            "SELECT count(*) FROM messages m JOIN threads t ON t.id = m.thread_id \
            WHERE t.lifecycle = 'current' AND m.upstream_sync IN ('missing', 'unknown')",
        ),
        (
            "threads with unsynced messages or an unsettled run",
            0,
            "SELECT count(*) FROM threads WHERE lifecycle = 'current' AND (unsynced_messages > 0 OR unsettled_run IS NOT NULL)",
        ),
        (
            "threads that miscount their messages",
            0,
            "SELECT count(*) FROM threads t \
            WHERE message_count <> (SELECT count(*) FROM messages m WHERE m.thread_id = t.id)",
        ),
        (
            "threads that miscount their runs",
            0,
            "SELECT count(*) FROM threads t \
            WHERE run_count <> (SELECT count(*) FROM runs r WHERE r.thread_id = t.id)",
        ),
        (
            "messages of a missing run",
            0,
            "SELECT count(*) FROM messages m \
            WHERE m.run_id IS NOT NULL AND NOT EXISTS (SELECT FROM runs r WHERE r.id = m.run_id)",
        ),
        (
            "runs with tool outputs or calls left",
            0,
            "SELECT count(*) FROM runs WHERE tool_outputs IS NOT NULL OR required_action IS NOT NULL",
        ),
        (
            "deletions that never ended",
            0,
            "SELECT count(*) FROM deletions WHERE finished_at IS NULL",
        ),
    ];
    for (what, wanted, sql) in none {
        let begun = Instant::now();
        let mut found = database.number(sql).await;
        while found != wanted && begun.elapsed() < Duration::from_secs(10) {
            sleep(Duration::from_millis(200)).await;
            found = database.number(sql).await;
        }
        if found != wanted {
            world.fault(Teller::Nobody, format!("{found} {what}, not {wanted}"));
        }
    }
    upstream(world);
}

/// Checks the counters of the upstream, which concern all users.
fn upstream(world: &World) {
    let stats = world.scene.simulator.stats();
    let seen = [
        (
            "runs at once on a thread",
            stats.max_active_runs_per_thread,
            1,
        ),
        (
            "messages added beside a run",
            usize::try_from(stats.messages_added_while_active).unwrap(),
            0,
        ),
        ("broken rules", stats.violations.len(), 0),
    ];
    for (what, found, most) in seen {
        if found > most {
            world.fault(
                Teller::Nobody,
                format!("{found} {what}: {:?}", stats.violations),
            );
        }
    }
    // Tool outputs are another request of the same run.
    let answered = world
        .scene
        .simulator
        .runs()
        .into_iter()
        .filter(|it| it.answered_calls.is_empty());
    let mut times: BTreeMap<String, usize> = BTreeMap::new();
    for run in answered.filter(|run| run.status.as_deref() == Some("completed")) {
        *times.entry(run.metadata[RUN_TAG].clone()).or_default() += 1;
    }
    for (run, times) in times.into_iter().filter(|(_, times)| *times > 1) {
        world.fault(
            Teller::Nobody,
            format!("the message of {run} was answered {times} times upstream"),
        );
    }
    let ended: BTreeMap<_, _> = stats.runs_ended.iter().collect();
    world.tell(Teller::Nobody, format!("runs upstream: {ended:?}"));
}
