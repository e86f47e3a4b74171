//! A person's data: the list of threads, the export, and the erasure.

use serde_json::{Value, json};

use crate::support::gateway::Gateway;
use crate::support::scene::{
    Backend, Protocol, Scene, on_each_protocol, on_each_store, on_every_scene,
};

on_every_scene!(user_erasure_removes_everything_and_reports_it);
on_each_protocol!(
    export_contains_all_data_of_user,
    user_deletion_supports_archive_and_dry_run,
    erasure_completes_when_upstream_cannot_delete,
    differently_worded_not_found_counts_as_already_gone,
    upstream_erasure_stops_after_configured_time,
);
on_each_store!(thread_list_includes_all_threads_of_user);

const USER: &str = "/v1/users/auth0%7C5f7c";
const BY_HAND: &str = "[janitor]\ninterval = \"1h\"\ncalls_per_second = 10000\n";

/// Makes every deletion at the upstream fail with this fault.
fn deletions_answer(scene: &Scene, fault: &str) {
    for on in [
        "delete_thread",
        "delete_conversation",
        "delete_item",
        "delete_response",
    ] {
        scene.fault(on, fault, 1000);
    }
}

/// Makes threads of all scopes, one of them archived.
async fn populate(gateway: &Gateway) {
    gateway.say(USER, "needle user").await;
    for n in 0..3 {
        gateway
            .say(&format!("{USER}/sessions/{n}"), "needle session")
            .await;
    }
    gateway
        .say(&format!("{USER}/topics/order"), "needle topic")
        .await;
    gateway
        .post(&format!("{USER}/topics/order/thread/rollover"), &json!({}))
        .await
        .ok();
    gateway
        .say(&format!("{USER}/topics/order"), "needle again")
        .await;
    gateway.say("/v1/users/other", "other needle").await;
}

async fn thread_list_includes_all_threads_of_user(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    assert_eq!(
        gateway.get(&format!("{USER}/threads")).await.ok()["data"],
        json!([])
    );
    populate(&gateway).await;
    let mut scopes = Vec::new();
    let mut after = String::new();
    loop {
        let page = gateway
            .get(&format!("{USER}/threads?limit=2&order=asc{after}"))
            .await
            .ok();
        for thread in page["data"].as_array().unwrap() {
            scopes.push(
                format!("{} {}", thread["key"]["scope"], thread["lifecycle"]).replace('"', ""),
            );
        }
        if page["has_more"] == false {
            break;
        }
        after = format!("&after={}", page["last_id"].as_str().unwrap());
    }
    assert_eq!(
        scopes,
        [
            "user current",
            "session:0 current",
            "session:1 current",
            "session:2 current",
            "topic:order archived",
            "topic:order current"
        ]
    );
    let newest = gateway.get(&format!("{USER}/threads?limit=1")).await.ok();
    assert!(newest["data"][0]["previous_thread"].is_string());
}

async fn export_contains_all_data_of_user(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    populate(&gateway).await;
    let answer = gateway.get(&format!("{USER}/export")).await;
    assert_eq!(answer.headers["content-type"], "application/x-ndjson");
    let Value::String(text) = answer.body else {
        panic!("{:#}", answer.body)
    };
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let of = |kind: &str| lines.iter().filter(|line| line["type"] == kind).count();
    assert_eq!(
        (of("thread"), of("message"), of("run")),
        (6, 12, 6),
        "{text}"
    );
    let end = lines.last().unwrap();
    assert_eq!(
        (&end["type"], &end["threads"], &end["messages"]),
        (&json!("end"), &json!(6), &json!(12))
    );
    assert!(text.contains("needle user") && !text.contains("other needle"));
    let nobody = gateway.get("/v1/users/nobody/export").await;
    assert!(
        nobody.body.to_string().contains("end"),
        "export of a user without data: {:?}",
        nobody.body
    );
}

async fn user_erasure_removes_everything_and_reports_it(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    let nothing = gateway.delete("/v1/users/nobody").await.ok();
    assert_eq!(
        (&nothing["status"], &nothing["threads_done"]),
        (&json!("completed"), &json!(0))
    );
    populate(&gateway).await;
    scene.simulator.hold();
    let mut running = gateway
        .stream(&format!("{USER}/sessions/0"), "needle at work")
        .await;
    running.next().await.unwrap();
    // One thread cannot be deleted at once.
    let on = match scene.protocol {
        Protocol::Assistants => "delete_thread",
        Protocol::Responses => "delete_conversation",
        Protocol::Chain => "delete_response",
    };
    scene.fault(on, "status=403", 1);
    let answer = gateway.delete_after(USER, "wait=2").await;
    scene.simulator.release();
    assert_eq!(running.rest().await.pop().unwrap().name, "run.cancelled");
    assert_eq!(answer.status, 202, "{:#}", answer.body);
    let place = answer.headers["location"].to_str().unwrap().to_owned();
    let wanted = |it: &crate::support::gateway::Answer| {
        it.body["threads_done"] == 5 && it.body["threads_pending"] == 1
    };
    let pending = gateway.until(&place, wanted).await.ok();
    let failed = pending["threads"]["data"]
        .as_array()
        .unwrap()
        .iter()
        .find(|it| it["status"] == "in_progress");
    assert!(
        failed.unwrap()["last_failure"]
            .as_str()
            .unwrap()
            .contains("403"),
        "{pending:#}"
    );
    scene
        .database
        .execute("UPDATE threads SET due_at = created_at WHERE attempts > 0")
        .await;
    gateway.post("/v1/admin/cleanup", &json!({})).await.ok();
    let receipt = gateway.get(&place).await.ok();
    assert_eq!(
        (&receipt["status"], &receipt["threads_done"]),
        (&json!("completed"), &json!(6)),
        "{receipt:#}"
    );
    let page = gateway.get(&format!("{place}?limit=4")).await.ok();
    assert_eq!(
        (
            page["threads"]["data"].as_array().unwrap().len(),
            &page["threads"]["has_more"]
        ),
        (4, &json!(true))
    );

    assert_eq!(
        scene.database.holding("auth0|5f7c").await,
        Vec::<String>::new(),
        "not even the key is left"
    );
    let left = scene.simulator.holds_text("needle");
    assert!(
        left.iter()
            .all(|it| scene.simulator.holds_text("other needle").contains(it)),
        "{left:?}"
    );
    assert_eq!(
        gateway.get(&format!("{USER}/threads")).await.ok()["data"],
        json!([])
    );
    assert_eq!(
        gateway.get("/v1/users/other/thread").await.ok()["message_count"],
        2
    );
}

async fn user_deletion_supports_archive_and_dry_run(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    populate(&gateway).await;
    let counts = |archive: bool, threads: i64, each: i64| {
        let (messages, runs) = (threads * 2 * each, threads * each);
        json!({"dry_run": true, "archive": archive, "threads": threads, "messages": messages, "runs": runs,
            "unfinished_runs": 0})
    };
    let dry = async |query: &str| {
        let answer = gateway.delete(&format!("{USER}?{query}")).await;
        assert!(!answer.headers.contains_key("location"));
        answer.ok()
    };
    // There are five current threads. One of them has an archived predecessor.
    assert_eq!(dry("dry_run=true&archive=true").await["threads"], 5);
    let all = dry("dry_run=true").await;
    assert_eq!(
        (&all["threads"], &all["runs"], &all["messages"]),
        (&json!(6), &json!(6), &json!(12)),
        "{all:#}"
    );
    assert_eq!(
        dry("dry_run=true&archive=false").await,
        all,
        "a dry run changes nothing"
    );
    let nobody = gateway.delete("/v1/users/nobody?dry_run=true").await.ok();
    assert_eq!(nobody, counts(false, 0, 0));
    let thread = format!("{USER}/sessions/0/thread");
    assert_eq!(
        gateway.delete(&format!("{thread}?dry_run=true")).await.ok(),
        counts(false, 1, 1)
    );
    assert_eq!(
        gateway
            .delete(&format!("{thread}?dry_run=true&archive=true"))
            .await
            .ok(),
        counts(true, 1, 1)
    );
    let nothing = gateway
        .delete(&format!("{USER}/topics/none/thread?dry_run=true"))
        .await;
    assert_eq!(nothing.problem(), (404, "not-found"));
    assert!(!scene.simulator.holds_text("needle session").is_empty());

    let receipt = gateway.delete(&format!("{USER}?archive=true")).await.ok();
    assert_eq!(
        (
            &receipt["status"],
            &receipt["archive"],
            &receipt["threads_done"]
        ),
        (&json!("completed"), &json!(true), &json!(5)),
        "{receipt:#}"
    );
    assert_eq!(
        scene.simulator.holds_text("needle session"),
        Vec::<String>::new()
    );
    let threads = gateway.get(&format!("{USER}/threads")).await.ok();
    let threads = threads["data"].as_array().unwrap();
    assert!(
        threads.len() == 6 && threads.iter().all(|it| it["lifecycle"] == "archived"),
        "{threads:#?}"
    );
    assert_eq!(
        gateway.get(&format!("{USER}/messages")).await.ok()["data"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    assert_eq!(
        gateway.get("/v1/users/other/thread").await.ok()["lifecycle"],
        "current"
    );
    assert_eq!(dry("dry_run=true&archive=true").await, counts(true, 0, 0));
    // All archived threads can still be erased.
    assert_eq!(gateway.delete(USER).await.ok()["threads_done"], 6);
    assert_eq!(
        scene.database.holding("needle session").await,
        Vec::<String>::new()
    );
}

async fn erasure_completes_when_upstream_cannot_delete(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    for (n, fault) in [
        "status=405 wording=detail",
        "status=501",
        "status=404 wording=detail",
        "status=404 wording=html",
    ]
    .into_iter()
    .enumerate()
    {
        let user = format!("/v1/users/u{n}");
        gateway.say(&user, "one").await;
        gateway.say(&user, "two").await;
        deletions_answer(&scene, fault);
        let receipt = gateway.delete_after(&user, "wait=20").await.ok();
        scene.simulator.clear_faults();
        assert_eq!(
            (
                &receipt["status"],
                &receipt["threads_done"],
                &receipt["threads_incomplete"]
            ),
            (&json!("completed"), &json!(1), &json!(1)),
            "{fault}: {receipt:#}"
        );
        let thread = &receipt["threads"]["data"][0];
        assert_eq!(
            thread["upstream_outcome"], "not_supported",
            "{fault}: {thread:#}"
        );
        assert!(thread["upstream_thread_id"].is_string(), "{thread:#}");
        let left = |what: &str| thread[format!("upstream_left_{what}")].as_u64().unwrap();
        let expected = match scene.protocol {
            Protocol::Assistants => (1, 0, 0),
            Protocol::Responses => (1, 4, 2),
            Protocol::Chain => (0, 0, 2),
        };
        assert_eq!(
            (left("threads"), left("items"), left("responses")),
            expected,
            "{fault}: {thread:#}"
        );
        assert_eq!(
            (&thread["last_failure"], &thread["upstream_tried_until"]),
            (&json!(null), &json!(null))
        );
        let threads = gateway.get(&format!("{user}/threads")).await.ok();
        assert_eq!(threads["data"], json!([]), "the database has nothing left");
    }
}

async fn differently_worded_not_found_counts_as_already_gone(scene: Scene) {
    let gateway = scene.gateway_with(BY_HAND).await;
    for (n, wording) in ["named", "relayed"].into_iter().enumerate() {
        let user = format!("/v1/users/u{n}");
        gateway.say(&user, "one").await;
        let gone = format!("status=404 wording={wording}");
        deletions_answer(&scene, &gone);
        for on in ["get_thread", "get_conversation", "get_response"] {
            scene.fault(on, &gone, 1000);
        }
        let receipt = gateway.delete_after(&user, "wait=20").await.ok();
        scene.simulator.clear_faults();
        assert_eq!(
            (&receipt["status"], &receipt["threads_incomplete"]),
            (&json!("completed"), &json!(0)),
            "{receipt:#}"
        );
        assert_eq!(
            receipt["threads"]["data"][0]["upstream_outcome"], "already_gone",
            "{receipt:#}"
        );
    }
}

async fn upstream_erasure_stops_after_configured_time(scene: Scene) {
    let gateway = scene
        .gateway_with(&format!("{BY_HAND}give_up_after = \"1d\"\n"))
        .await;
    gateway.say(USER, "one").await;
    gateway.say(USER, "two").await;
    deletions_answer(&scene, "status=403");
    let answer = gateway.delete_after(USER, "wait=1").await;
    assert_eq!(answer.status, 202, "{:#}", answer.body);
    let place = answer.headers["location"].to_str().unwrap().to_owned();
    let wanted = |it: &crate::support::gateway::Answer| {
        it.body["threads"]["data"][0]["attempts"].as_i64() > Some(0)
    };
    let thread = gateway.until(&place, wanted).await.ok()["threads"]["data"][0].clone();
    assert!(
        thread["last_failure"].as_str().unwrap().contains("403"),
        "{thread:#}"
    );
    assert!(
        thread["upstream_tried_until"].is_string() && thread["upstream_outcome"].is_null(),
        "{thread:#}"
    );
    let look = async || {
        scene
            .database
            .execute("UPDATE threads SET due_at = created_at WHERE attempts > 0")
            .await;
        gateway.post("/v1/admin/cleanup", &json!({})).await.ok()
    };
    assert_eq!(
        look().await["failed"],
        1,
        "the upstream's limit of a day has begun"
    );
    assert_eq!(gateway.get(&place).await.ok()["status"], "in_progress");
    // Moves the limit a day back.
    let until = thread["upstream_tried_until"].as_str().unwrap();
    let column = if scene.backend == Backend::Postgres {
        "upstream_cleanup::text"
    } else {
        "upstream_cleanup"
    };
    let cast = if scene.backend == Backend::Postgres {
        "::jsonb"
    } else {
        ""
    };
    let earlier = format!(
        "UPDATE threads SET upstream_cleanup = replace({column}, '{}', '2020-01-01'){cast} WHERE attempts > 0",
        &until[..10]
    );
    scene.database.execute(&earlier).await;
    assert_eq!(look().await["failed"], 0);
    scene.simulator.clear_faults();
    let receipt = gateway.get(&place).await.ok();
    assert_eq!(
        (&receipt["status"], &receipt["threads_incomplete"]),
        (&json!("completed"), &json!(1)),
        "{receipt:#}"
    );
    let thread = &receipt["threads"]["data"][0];
    assert_eq!(thread["upstream_outcome"], "failed", "{thread:#}");
    assert!(
        thread["last_failure"].as_str().unwrap().contains("403"),
        "{thread:#}"
    );
    let left = |what: &str| thread[format!("upstream_left_{what}")].as_u64().unwrap();
    let expected = match scene.protocol {
        Protocol::Assistants => (1, 0),
        Protocol::Responses => (1, 2),
        Protocol::Chain => (0, 2),
    };
    assert_eq!((left("threads"), left("responses")), expected, "{thread:#}");
}
