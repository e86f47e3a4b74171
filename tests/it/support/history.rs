//! A conversation as the gateway's transcript and as the upstream thread have it, and a
//! comparison of the two.

use serde_json::Value;

use super::gateway::Gateway;
use super::scene::Scene;

/// Role and text of one entry. A reply in several parts or messages counts as one entry.
pub(crate) type Line = (String, String);

/// Returns the whole transcript of a conversation, oldest message first.
pub(crate) async fn messages(gateway: &Gateway, scope: &str) -> Vec<Value> {
    all(gateway, &format!("{scope}/messages")).await
}

/// Returns all entries of a list of several pages, oldest first.
pub(crate) async fn all(gateway: &Gateway, list: &str) -> Vec<Value> {
    let mut entries = Vec::new();
    let mut after = String::new();
    let and = if list.contains('?') { '&' } else { '?' };
    loop {
        let page = gateway
            .get(&format!("{list}{and}order=asc&limit=100{after}"))
            .await
            .ok();
        entries.extend(page["data"].as_array().unwrap().clone());
        if page["has_more"] == false {
            return entries;
        }
        after = format!("&after={}", page["last_id"].as_str().unwrap());
    }
}

/// Returns roles and texts of the transcript's messages that the model may see.
pub(crate) async fn transcript(gateway: &Gateway, scope: &str) -> Vec<Line> {
    let messages = messages(gateway, scope).await;
    let known = messages
        .iter()
        .filter(|message| message["visible_to_model"] == true);
    let lines = known.map(|message| {
        let parts = message["content"].as_array().unwrap().iter();
        let text: String = parts
            .filter(|part| part["type"] != "tool_call")
            .map(|part| part["text"].as_str().or(part["refusal"].as_str()).unwrap())
            .collect();
        (message["role"].as_str().unwrap().to_owned(), text)
    });
    joined(lines)
}

/// Returns roles and texts of the upstream thread.
pub(crate) async fn upstream(scene: &Scene, gateway: &Gateway, scope: &str) -> Vec<Line> {
    let thread = gateway.get(&format!("{scope}/thread")).await.ok();
    let id = thread["upstream_thread_id"].as_str().unwrap_or_default();
    let lines = scene.simulator.thread_history(id).into_iter();
    joined(lines)
}

/// Asserts that transcript and upstream thread contain the same lines.
pub(crate) async fn assert_same(scene: &Scene, gateway: &Gateway, scope: &str) {
    let (here, there) = (
        transcript(gateway, scope).await,
        upstream(scene, gateway, scope).await,
    );
    let first = here
        .iter()
        .zip(&there)
        .position(|(here, there)| here != there);
    let at = first.unwrap_or(here.len().min(there.len()));
    if here != there {
        print_report(scene, gateway, scope, &there).await;
    }
    let around = |lines: &[Line]| {
        lines[at.saturating_sub(3).min(lines.len())..(at + 4).min(lines.len())].to_vec()
    };
    assert!(
        here == there,
        "{scope}: transcript and upstream thread differ from line {at} on:\ntranscript {:#?}\nupstream {:#?}",
        around(&here),
        around(&there)
    );
}

/// Joins consecutive lines of the assistant into one. Leaves out the notes that stand for calls of
/// tools in some upstream threads.
pub(crate) fn joined(lines: impl Iterator<Item = Line>) -> Vec<Line> {
    let mut all: Vec<Line> = Vec::new();
    let said = lines.filter(|(_, text)| !text.is_empty() && !text.starts_with("[Called the tool "));
    for (role, text) in said {
        match all.last_mut() {
            Some((last, before)) if *last == role && role == "assistant" => before.push_str(&text),
            _ => all.push((role, text)),
        }
    }
    all
}

/// Prints, for the report of a failure, the transcript with the result of each run. For messages
/// that the upstream lacks, or has although the model is not to see them, it adds the run's log
/// lines.
async fn print_report(scene: &Scene, gateway: &Gateway, scope: &str, there: &[Line]) {
    for message in messages(gateway, scope).await {
        let run = gateway
            .get(&format!(
                "{scope}/runs/{}",
                message["run_id"].as_str().unwrap()
            ))
            .await
            .body;
        let run = &run["run"];
        println!(
            "{} {} known={} | {} {} {} {} | {}",
            message["position"],
            message["role"],
            message["visible_to_model"],
            run["id"],
            run["status"],
            run["error"]["code"],
            run["multitask_strategy"],
            message["content"]
                .to_string()
                .chars()
                .take(90)
                .collect::<String>(),
        );
        let text = message["content"][0]["text"].as_str().unwrap_or_default();
        let is_there = there.iter().any(|(_, known)| known.contains(text));
        if message["visible_to_model"] != is_there {
            let id = run["id"].as_str().unwrap();
            let user = scope.rsplit('/').next().unwrap();
            for state in ["present", "missing", "unknown"] {
                let sql = format!(
                    "SELECT count(*) FROM messages m JOIN threads t ON t.id = m.thread_id \
                     WHERE t.user_key = '{user}' AND m.position = {} AND m.upstream_sync = '{state}'",
                    message["position"]
                );
                println!("  {state}: {}", scene.database.number(&sql).await);
            }
            gateway
                .logs()
                .iter()
                .filter(|line| line.contains(id))
                .for_each(|line| println!("  LOG {line}"));
        }
    }
}
