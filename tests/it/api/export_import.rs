//! Exporting and importing conversations.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use futures_util::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use tempfile::TempDir;
use threadkeeper::domain::{Reader, TenantKey};
use threadkeeper::export_import::{What, export};
use threadkeeper::store::{Admission, Admitted};

use crate::store_contract::{admission, completed, user};
use crate::support::TestDatabase;
use crate::support::gateway::Gateway;

/// Makes a test of each function for each store. A case is `case(databases)`, and `databases`
/// makes a new database.
macro_rules! on_both {
    ($($case:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $case() {
                super::$case(async || super::TestDatabase::sqlite().await).await;
            })+
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $case() {
                super::$case(async || super::TestDatabase::postgres().await).await;
            })+
        }
    };
}

on_both!(
    export_round_trips_through_import,
    minimal_import_lines_are_accepted_and_idempotent,
    bad_import_lines_are_reported_and_rest_imported,
    truncated_import_file_is_detected,
    paged_export_is_complete_despite_concurrent_deletion,
    export_groups_runs_and_messages_by_thread,
    imported_messages_may_name_any_known_thread,
    refused_import_lines_are_reported_by_number,
    user_export_contains_only_own_threads,
    export_from_before_0_2_is_imported,
);

/// A database, and a configuration for it.
struct Place {
    database: TestDatabase,
    folder: TempDir,
}

/// The result of a command.
struct Said {
    ok: bool,
    out: String,
    err: String,
}

impl Place {
    fn new(database: TestDatabase) -> Self {
        let folder = TempDir::new().unwrap();
        let config = format!(
            "[store]\nurl = {:?}\n[upstreams.main]\nkind = \"responses\"\nbase_url = \"http://127.0.0.1:9/v1\"\n\
             api_key = \"sk-x\"\n[assistants.default]\nupstream = \"main\"\nmodel = \"m\"\n[threads]\nmax_age = \"90d\"\n",
            database.url()
        );
        std::fs::write(folder.path().join("gateway.toml"), config).unwrap();
        Self { database, folder }
    }

    fn run(&self, command: &str, args: &[&Path], input: &str) -> Said {
        let mut it = Gateway::command(&[command, "--config"]);
        it.arg(self.folder.path().join("gateway.toml")).args(args);
        it.stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = it.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_owned();
        // A command that stops reading closes its input, so the write may fail.
        let writer = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Said {
            ok: output.status.success(),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }

    #[track_caller]
    fn export(&self) -> String {
        let said = self.run("export", &[], "");
        assert!(said.ok, "{}", said.err);
        said.out
    }

    /// Imports lines, which must succeed without warnings. Returns the summary.
    #[track_caller]
    fn import(&self, lines: &str) -> String {
        let said = self.run("import", &[], lines);
        assert!(said.ok && said.out.is_empty(), "{}", said.err);
        said.err.lines().last().unwrap().to_owned()
    }

    /// Imports lines of which some must be refused. Returns the messages.
    #[track_caller]
    fn import_fails(&self, lines: &str) -> String {
        let said = self.run("import", &[], lines);
        assert!(!said.ok && said.out.is_empty(), "{}", said.err);
        said.err
    }

    /// Admits a message and finishes its run.
    async fn exchange(&self, user_key: &str) {
        let store = self.database.store().await;
        let request = Admission {
            upstream: "main".to_owned(),
            ..admission(&user(user_key))
        };
        let Admitted::Started(turn) = store.admit(request.clone()).await.unwrap() else {
            panic!("the run was not started")
        };
        store
            .finish(&turn.lease, completed(Some("hi")))
            .await
            .unwrap();
        store.close().await;
    }
}

fn parsed(lines: &str) -> Vec<Value> {
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn lines(values: &[Value]) -> String {
    values
        .iter()
        .map(Value::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}

fn of_type<'a>(lines: &'a [Value], name: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["type"] == name).collect()
}

/// Two conversations, one of them with an archived thread.
const RICH: &str = r#"{"type":"thread","id":"thr_0190163d8694739aea0d1e59d2a9a001","key":{"tenant":"default","user":"alice","scope":"session:tab-1"},"upstream":"gone","lifecycle":"archived","created_at":"2024-06-14T12:00:00.123Z","last_active_at":"2024-06-15T12:00:00Z","archived_at":"2024-07-01T00:00:00Z"}
{"type":"message","id":"msg_0190163d8694739aea0d1e59d2a9b001","role":"user","content":[{"type":"text","text":"H\u00ebllo\n\"quoted\""},{"type":"image_url","image_url":{"url":"https://example.org/a.png"}}],"context":"withheld","created_at":"2024-06-14T12:00:01Z"}

{"type":"thread","id":"thr_01922c9c1e7a7d1c8a55d7d2a9a00200","key":{"user":"alice","scope":"session:tab-1"},"upstream_thread_id":"conv_1","previous_thread":"thr_0190163d8694739aea0d1e59d2a9a001","metadata":{"plan":"gold"},"created_at":"2024-09-26T00:00:00Z","last_active_at":"2024-09-27T00:00:00Z","max_idle_ms":31536000000000}
{"type":"message","id":"msg_01922c9c1e7a7d1c8a55d7d2a9b00201","thread_id":"thr_01922c9c1e7a7d1c8a55d7d2a9a00200","role":"user","content":"Hi","upstream_message_id":"item_1"}
{"type":"message","id":"msg_01922c9c1e7a7d1c8a55d7d2a9b00202","thread_id":"thr_01922c9c1e7a7d1c8a55d7d2a9a00200","role":"assistant","content":[{"type":"refusal","refusal":"No."}],"upstream_sync":"missing"}
{"type":"end","threads":2,"runs":0,"messages":3}
"#;

async fn export_round_trips_through_import(databases: impl AsyncFn() -> TestDatabase) {
    let (one, two) = (Place::new(databases().await), Place::new(databases().await));
    assert_eq!(
        one.import(RICH),
        "imported: 2 threads and 3 messages added, 0 threads and 0 messages were there already, 0 lines refused"
    );
    one.exchange("bob").await;
    let file = one.folder.path().join("out.ndjson");
    let said = one.run("export", &[Path::new("--out"), &file], "");
    assert!(
        said.ok && said.out.is_empty() && said.err.contains("exported: 10 lines"),
        "{}",
        said.err
    );
    let first = std::fs::read_to_string(&file).unwrap();
    assert_eq!(first, one.export(), "each export is the same");

    let mut all = parsed(&first);
    assert_eq!(
        all.last().unwrap(),
        &json!({"type": "end", "threads": 3, "runs": 1, "messages": 5})
    );
    let kinds: Vec<_> = all
        .iter()
        .map(|line| line["type"].as_str().unwrap())
        .collect();
    let thread = ["thread", "message", "thread", "message", "message"];
    assert_eq!(
        kinds,
        [&thread[..], &["thread", "run", "message", "message", "end"]].concat()
    );
    assert_eq!(all[6]["status"], "completed");
    assert_eq!(all[2]["metadata"], json!({"plan": "gold"}));
    assert_eq!(all[2]["previous_thread"], all[0]["id"]);
    assert_eq!(all[0]["created_at"], "2024-06-14T12:00:00.123Z");
    assert_eq!(all[1]["content"][0]["text"], "H\u{eb}llo\n\"quoted\"");

    let summary = two.run("import", &[&file], "").err;
    assert!(
        summary.contains("imported: 3 threads and 5 messages added"),
        "{summary}"
    );
    assert!(summary.contains("1 lines of runs passed over"), "{summary}");
    let second = two.export();
    // Everything but the run comes back. The messages do not name it any more.
    all.retain(|line| line["type"] != "run");
    for line in &mut all {
        if line["type"] == "message" {
            line["run_id"] = Value::Null;
        }
        if line["type"] == "end" {
            line["runs"] = json!(0);
        }
    }
    assert_eq!(parsed(&second), all);

    for _ in 0..2 {
        let summary = two.import(&first);
        assert!(
            summary.contains("0 threads and 0 messages added, 3 threads and 5 messages were"),
            "{summary}"
        );
        assert_eq!(two.export(), second);
    }
    let due = "SELECT count(*) FROM threads WHERE lifecycle = 'archived' AND due_at IS NOT NULL";
    assert_eq!(two.database.number(due).await, 1);
}

async fn minimal_import_lines_are_accepted_and_idempotent(
    databases: impl AsyncFn() -> TestDatabase,
) {
    let place = Place::new(databases().await);
    let thread = |user: &str, upstream: &str| json!({"type": "thread", "key": {"user": user}, "upstream_thread_id": upstream});
    let said = |role: &str, text: &str| json!({"type": "message", "role": role, "content": text});
    let mut table = vec![
        thread("alice", "thread_a"),
        said("user", "Hello"),
        said("assistant", "Hello, Alice."),
        thread("bob", "thread_b"),
        json!({"type": "thread", "key": {"user": "bob", "scope": "topic:order 7"}}),
        said("user", "Where is it?"),
    ];
    let summary = place.import(&lines(&table));
    assert!(
        summary.contains("3 threads and 3 messages added"),
        "{summary}"
    );
    let first = place.export();
    assert!(
        place
            .import(&lines(&table))
            .contains("0 threads and 0 messages added, 3 threads and 3 messages were")
    );
    assert_eq!(place.export(), first);

    // These lines add to the same conversation.
    table.insert(3, said("user", "One more thing"));
    let marked = format!("\u{feff}{}", lines(&table));
    assert!(
        place
            .import(&marked)
            .contains("0 threads and 1 messages added"),
        "the byte order mark of Windows programs is accepted"
    );
    let all = parsed(&place.export());
    let threads = of_type(&all, "thread");
    // Threads of the same millisecond have no order.
    let mut keys: Vec<_> = threads
        .iter()
        .map(|thread| thread["key"]["scope"].as_str().unwrap())
        .collect();
    keys.sort_unstable();
    assert_eq!(keys, ["topic:order 7", "user", "user"]);
    assert!(
        threads
            .iter()
            .all(|thread| thread["upstream"] == "main" && thread["lifecycle"] == "current")
    );
    let messages = of_type(&all, "message");
    let mut syncs: Vec<_> = messages
        .iter()
        .map(|message| message["upstream_sync"].as_str().unwrap())
        .collect();
    syncs.sort_unstable();
    assert_eq!(syncs, ["missing", "present", "present", "present"]);
    let due = "SELECT count(*) FROM threads WHERE due_at IS NOT NULL";
    assert_eq!(
        place.database.number(due).await,
        3,
        "the threads expire as configured"
    );
}

async fn bad_import_lines_are_reported_and_rest_imported(
    databases: impl AsyncFn() -> TestDatabase,
) {
    let place = Place::new(databases().await);
    place.import(
        "{\"type\":\"thread\",\"key\":{\"user\":\"alice\"},\"upstream_thread_id\":\"thread_a\"}\n",
    );
    let id = "thr_01922c9c1e7a7d1c8a55d7d2a9a00200";
    let (young, unknown) = (
        "thr_ffffffffffff4d1c8a55d7d2a9a00200",
        "thr_01922c9c1e7a7d1c8a55d7d2a9a00299",
    );
    let message =
        |role: &str, content: Value| json!({"type": "message", "role": role, "content": content});
    let cases: Vec<(String, &str)> = vec![
        (message("user", json!("Hi")).to_string(), "must come after the line of its thread"),
        ("nonsense".to_owned(), "is not a JSON object"),
        ("[]".to_owned(), "is not a JSON object"),
        (json!({"typ": "thread"}).to_string(), "`type` must be"),
        (json!({"type": "thread"}).to_string(), "`key` is missing"),
        (json!({"type": "thread", "key": {"user": ""}}).to_string(), "`key.user`: a key must not be empty"),
        (json!({"type": "thread", "key": {"user": "a", "scope": "room:1"}}).to_string(), "`key.scope`: a scope is"),
        (json!({"type": "thread", "key": {"user": ".."}}).to_string(), "`key.user`: a key must not be …"),
        (
            json!({"type": "thread", "key": {"user": "a", "scope": "topic:."}}).to_string(),
            "`key.scope`: a scope is …",
        ),
        (json!({"type": "thread", "key": {"user": "a"}, "max_age_ms": "x"}).to_string(), "must be a whole number"),
        (json!({"type": "thread", "key": {"user": "a"}, "created_at": "2026"}).to_string(), "must be a time"),
        (json!({"type": "thread", "key": {"user": "a"}, "metadata": {"k": "a\u{0}"}}).to_string(), "NUL"),
        (json!({"type": "thread", "key": {"user": "a"}, "thread": "x"}).to_string(), "there is no field `thread` here, only `id`, "),
        (json!({"type": "thread", "key": {"user": "a"}, "id": "7"}).to_string(), "`id`: an id of this kind"),
        (json!({"type": "thread", "key": {"user": "a"}, "lifecycle": "deleting"}).to_string(), "`lifecycle` must"),
        (json!({"type": "thread", "key": {"user": "a"}, "upstream": "spare"}).to_string(), "no upstream `spare`"),
        (
            json!({"type": "thread", "key": {"user": "a"}, "upstream_thread_id": ""}).to_string(),
            "`upstream_thread_id` must",
        ),
        (
            json!({"type": "thread", "key": {"user": "a"}, "id": young, "created_at": "2024-01-01T00:00:00Z"})
                .to_string(),
            "later than `created_at`",
        ),
        (
            json!({"type": "thread", "key": {"user": "a"}, "archived_at": "1969-12-31T00:00:00Z"}).to_string(),
            "`archived_at` must be a time",
        ),
        (json!({"type": "thread", "key": {"user": "a"}, "created_at": "soon"}).to_string(), "`created_at`: must be a time"),
        (
            json!({"type": "thread", "key": {"user": "alice"}, "upstream_thread_id": "thread_b"}).to_string(),
            "the key has another current thread, thr_",
        ),
        (message("user", json!("of a refused thread")).to_string(), ""),
        (json!({"type": "thread", "key": {"user": "bob"}, "id": id}).to_string(), ""),
        (message("user", json!("")).to_string(), "content must not be empty"),
        (message("user", json!([{"type": "refusal", "refusal": "x"}])).to_string(), "`refusal` is for replies"),
        (message("user", json!([{"type": "audio"}])).to_string(), "`content[0].type`: must be one of `text`, `image_url`, `image_file`, `file`"),
        (message("system", json!("x")).to_string(), "`role` must be `user` or `assistant`: leave out"),
        (message("user", json!("Good")).to_string(), ""),
        (json!({"type": "thread", "key": {"user": "carol"}, "id": id}).to_string(), "a thread of another key"),
        (
            json!({"type": "message", "thread_id": unknown, "role": "user", "content": "x"}).to_string(),
            "there is no thread thr_01922c9c1e7a7d1c8a55d7d2a9a00299",
        ),
        (json!({"type": "message", "thread_id": id, "role": "user", "content": "Better"}).to_string(), ""),
        (json!({"type": "run", "whatever": 1}).to_string(), ""),
        (json!({"type": "end", "threads": 1, "runs": 0, "messages": 0}).to_string(), "it is not whole"),
        (message("user", json!("late")).to_string(), "nothing may follow the end line"),
    ];
    let text = cases
        .iter()
        .map(|(line, _)| line.as_str())
        .collect::<Vec<_>>()
        .join("\n");
    let said = place.import_fails(&text);
    let mut told = said.lines().filter(|line| line.starts_with("line "));
    for (n, (line, problem)) in cases
        .iter()
        .enumerate()
        .filter(|(_, (_, problem))| !problem.is_empty())
    {
        let found = told.next().unwrap_or_default();
        assert!(
            found.starts_with(&format!("line {}: ", n + 1)) && found.contains(problem),
            "{line}\n{said}"
        );
    }
    assert_eq!(told.next(), None, "{said}");
    let refused = cases
        .iter()
        .filter(|(_, problem)| !problem.is_empty())
        .count();
    let summary = format!(
        "imported: 1 threads and 2 messages added, 0 threads and 0 messages were there already, {refused} lines \
         refused, 1 messages of refused threads passed over, 1 lines of runs passed over"
    );
    assert!(said.contains(&summary), "{said}");
    assert!(
        said.ends_with(&format!("threadkeeper: {refused} lines were refused\n")),
        "{said}"
    );
    let all = parsed(&place.export());
    let texts: Vec<_> = of_type(&all, "message")
        .iter()
        .map(|line| &line["content"][0]["text"])
        .collect();
    assert_eq!(texts, ["Good", "Better"]);

    let long = format!(
        "{{\"type\":\"thread\",\"key\":{{\"user\":\"{}\"}}}}\n",
        "x".repeat(17 << 20)
    );
    let said = place.import_fails(&(long + "{\"type\":\"thread\",\"key\":{\"user\":\"dave\"}}"));
    assert!(
        said.contains("line 1: it is longer than")
            && said.contains("1 threads and 0 messages added"),
        "{said}"
    );
}

async fn truncated_import_file_is_detected(databases: impl AsyncFn() -> TestDatabase) {
    let place = Place::new(databases().await);
    let whole = RICH.trim_end();
    let cut = &whole[..whole.rfind('\n').unwrap()];
    assert!(place.import_fails(cut).contains("it was cut off"));
    let said = place.import_fails(&whole[..whole.len() - 20]);
    assert!(
        said.contains("line 7: it is not a JSON object") && said.contains("it was cut off"),
        "{said}"
    );
    let first = whole.find('\n').unwrap();
    let said = place.import_fails(&whole[first + 1..]);
    assert!(
        said.contains("counts 2 threads, 0 runs and 3 messages, but the file has 1, 0 and 3"),
        "{said}"
    );
    assert!(
        place
            .import(RICH)
            .contains("0 threads and 0 messages added")
    );
}

async fn paged_export_is_complete_despite_concurrent_deletion(
    databases: impl AsyncFn() -> TestDatabase,
) {
    let place = Place::new(databases().await);
    let mut table: Vec<Value> = (0..120)
        .map(|n| json!({"type": "thread", "key": {"user": format!("u{n}")}}))
        .collect();
    table.extend(
        (0..230).map(|n| json!({"type": "message", "role": "user", "content": format!("m{n}")})),
    );
    place.import(&lines(&table));
    let all = parsed(&place.export());
    assert_eq!(
        all.last().unwrap(),
        &json!({"type": "end", "threads": 120, "runs": 0, "messages": 230})
    );
    let texts: Vec<_> = of_type(&all, "message")
        .iter()
        .map(|line| line["content"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts, (0..230).map(|n| format!("m{n}")).collect::<Vec<_>>());

    // The thread before the next page is erased during the export.
    let store = place.database.store().await;
    let mut lines = std::pin::pin!(export(
        store.clone(),
        What::All(TenantKey::default()),
        Reader::Backend
    ));
    let mut got = vec![];
    while let Some(line) = lines.next().await {
        got.push(line.unwrap());
        if got.len() == 50 {
            let last: Value = serde_json::from_str(&got[49]).unwrap();
            let user = last["key"]["user"].as_str().unwrap();
            place
                .database
                .execute(&format!("DELETE FROM threads WHERE user_key = '{user}'"))
                .await;
        }
    }
    store.close().await;
    let threads: std::collections::BTreeSet<_> = got
        .iter()
        .filter(|line| line.contains("\"thread\""))
        .collect();
    assert_eq!(threads.len(), 120);
    assert!(
        got.last().unwrap().contains("\"threads\":120"),
        "{:?}",
        got.last()
    );
}

async fn export_groups_runs_and_messages_by_thread(databases: impl AsyncFn() -> TestDatabase) {
    let place = Place::new(databases().await);
    for user in ["alice", "bob", "alice"] {
        place.exchange(user).await;
    }
    let mut table = vec![json!({"type": "thread", "key": {"user": "carol"}})];
    table.extend(
        (0..1200).map(|n| json!({"type": "message", "role": "user", "content": format!("m{n}")})),
    );
    place.import(&lines(&table));
    for user in ["dave", "carol", "erin", "dave"] {
        place.exchange(user).await;
    }
    let all = parsed(&place.export());
    let mut got: Vec<(&str, usize, usize)> = Vec::new();
    let mut thread = &Value::Null;
    for line in &all {
        match line["type"].as_str().unwrap() {
            "thread" => {
                thread = &line["id"];
                got.push((line["key"]["user"].as_str().unwrap(), 0, 0));
            }
            "end" => assert_eq!(line, all.last().unwrap()),
            kind => {
                assert_eq!(&line["thread_id"], thread);
                let (_, runs, messages) = got.last_mut().unwrap();
                assert!(
                    kind == "message" || *messages == 0,
                    "runs come before messages"
                );
                *if kind == "run" { runs } else { messages } += 1;
            }
        }
    }
    let wanted = [
        ("alice", 2, 4),
        ("bob", 1, 2),
        ("carol", 1, 1202),
        ("dave", 2, 4),
        ("erin", 1, 2),
    ];
    assert_eq!(got, wanted);
    let texts = of_type(&all, "message")
        .iter()
        .map(|line| line["content"][0]["text"].as_str().unwrap())
        .collect::<Vec<_>>();
    assert_eq!(
        texts[6..1206],
        (0..1200).map(|n| format!("m{n}")).collect::<Vec<_>>()
    );
    assert_eq!(
        all.last().unwrap(),
        &json!({"type": "end", "threads": 5, "runs": 7, "messages": 1214})
    );
}

async fn imported_messages_may_name_any_known_thread(databases: impl AsyncFn() -> TestDatabase) {
    let place = Place::new(databases().await);
    place.import(&lines(&[
        json!({"type": "thread", "key": {"user": "carol"}}),
    ]));
    let carol = parsed(&place.export())[0]["id"].clone();
    let [alice, bob] =
        ["a001", "b001"].map(|end| json!(format!("thr_0190163d8694739aea0d1e59d2a9{end}")));
    let mut number = 0;
    let mut said = |thread: &Value, text: &str| {
        number += 1;
        let id = format!("msg_0190163d8694739aea0d1e59d2a9c{number:03}");
        json!({"type": "message", "id": id, "thread_id": thread, "role": "user", "content": text})
    };
    let table = [
        said(&alice, "before the thread"),
        said(&alice, "of an unknown one"),
        json!({"type": "thread", "id": alice, "key": {"user": "alice"}}),
        said(&Value::Null, "one"),
        json!({"type": "thread", "id": bob, "key": {"user": "bob"}}),
        said(&alice, "two"),
        said(&bob, "three"),
        json!({"type": "thread", "id": bob, "key": {"user": "alice"}}),
        said(&bob, "of a refused line"),
        said(&carol, "four"),
        said(&bob, "five"),
        json!({"type": "thread", "key": {"user": "carol"}}),
        said(&Value::Null, "six"),
        said(&carol, "seven"),
        said(&alice, "eight"),
        said(&Value::Null, "nine"),
        json!({"type": "end", "threads": 4, "runs": 0, "messages": 12}),
    ];
    for (added, known) in [((2, 9), (1, 0)), ((0, 2), (3, 9))] {
        let told = place.import_fails(&lines(&table));
        let refused: Vec<&str> = told
            .lines()
            .filter(|line| line.starts_with("line "))
            .collect();
        let others = refused
            .iter()
            .position(|line| line.starts_with("line 8: `id` belongs to a thread of another key"));
        // The second time, the thread exists before its line.
        assert_eq!(
            (refused.len(), others),
            if added.0 == 2 {
                (2, Some(1))
            } else {
                (1, Some(0))
            },
            "{told}"
        );
        let passed_over = if added.0 == 2 { 2 } else { 1 };
        let summary = format!(
            "imported: {} threads and {} messages added, {} threads and {} messages were there already, {} lines \
             refused, {passed_over} messages of refused threads passed over",
            added.0,
            added.1,
            known.0,
            known.1,
            refused.len()
        );
        assert!(told.contains(&summary), "{summary}\n{told}");
    }
    let all = parsed(&place.export());
    let texts = |thread: &Value| {
        let of_thread = of_type(&all, "message")
            .into_iter()
            .filter(|line| &line["thread_id"] == thread);
        of_thread
            .map(|line| line["content"][0]["text"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        texts(&alice),
        [
            "one",
            "two",
            "eight",
            "nine",
            "before the thread",
            "of an unknown one"
        ]
    );
    assert_eq!(texts(&bob), ["three", "five"]);
    assert_eq!(texts(&carol), ["four", "six", "seven"]);
}

async fn refused_import_lines_are_reported_by_number(databases: impl AsyncFn() -> TestDatabase) {
    let place = Place::new(databases().await);
    let line = |n: u32| match n {
        n if n % 700 == 0 => json!({"type": "message", "role": "system", "content": "x"}),
        n if n % 3 == 1 => json!({"type": "thread", "key": {"user": format!("u{n}")}}),
        n => json!({"type": "message", "role": "user", "content": format!("m{n}")}),
    };
    let mut table: Vec<Value> = (1..=2999).map(line).collect();
    table.push(json!({"type": "thread", "key": {"user": "u1"}, "upstream_thread_id": "thread_x"}));
    table.push(json!({"type": "message", "role": "user", "content": "of a refused thread"}));
    let told = place.import_fails(&lines(&table));
    let numbers: Vec<&str> = told
        .lines()
        .filter_map(|line| line.strip_prefix("line ")?.split(':').next())
        .collect();
    assert_eq!(numbers, ["700", "1400", "2100", "2800", "3000"], "{told}");
    let threads = of_type(&table[..2999], "thread").len();
    let summary = format!(
        "imported: {threads} threads and {} messages added, 0 threads and 0 messages were there already, 5 lines \
         refused, 1 messages of refused threads passed over",
        2999 - 4 - threads
    );
    assert!(told.contains(&summary), "{summary}\n{told}");
}

async fn user_export_contains_only_own_threads(databases: impl AsyncFn() -> TestDatabase) {
    let place = Place::new(databases().await);
    place.import(RICH);
    place.exchange("bob").await;
    place.database.execute("UPDATE threads SET lifecycle = 'deleting', deletion = 'erase' WHERE previous_thread_id IS NULL AND user_key = 'alice'").await;
    let store = place.database.store().await;
    for (name, wanted) in [
        (
            "alice",
            json!({"type": "end", "threads": 1, "runs": 0, "messages": 2}),
        ),
        (
            "bob",
            json!({"type": "end", "threads": 1, "runs": 1, "messages": 2}),
        ),
        (
            "nobody",
            json!({"type": "end", "threads": 0, "runs": 0, "messages": 0}),
        ),
    ] {
        let what = What::User(TenantKey::default(), user(name).user);
        let got: Vec<String> = export(store.clone(), what, Reader::Backend)
            .try_collect()
            .await
            .unwrap();
        let got = parsed(&got.concat());
        assert_eq!(got.last(), Some(&wanted));
        assert!(
            of_type(&got, "thread")
                .iter()
                .all(|thread| thread["key"]["user"] == name)
        );
    }
    store.close().await;
}

/// `docs/upgrading.md` promises that an export of a version before 0.2 can be imported.
async fn export_from_before_0_2_is_imported(databases: impl AsyncFn() -> TestDatabase) {
    let place = Place::new(databases().await);
    let old = include_str!("../../fixtures/export/before-0.2.ndjson")
        .replace("\"simulator\"", "\"main\"");
    for _ in 0..2 {
        place.import(&old);
        let ours = |lines: &str| -> Vec<Value> {
            let mut lines = parsed(lines);
            lines.retain(|line| line["type"] == "thread" || line["type"] == "message");
            for line in lines.iter_mut().filter(|line| line["type"] == "message") {
                line["run_id"] = Value::Null;
                // What the key was called before.
                if let Some(sync) = line.as_object_mut().unwrap().remove("context") {
                    line["upstream_sync"] = sync;
                }
            }
            lines
        };
        assert_eq!(
            ours(&place.export()),
            ours(&old),
            "everything but the runs is imported"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_export_round_trips_through_postgres() {
    let (one, two) = (
        Place::new(TestDatabase::sqlite().await),
        Place::new(TestDatabase::postgres().await),
    );
    one.import(RICH);
    let taken = one.export();
    two.import(&taken);
    assert_eq!(two.export(), taken);
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_export_and_import_report_reason() {
    let place = Place::new(TestDatabase::sqlite().await);
    let file = place.folder.path().join("out.ndjson");
    std::fs::write(&file, "precious").unwrap();
    let missing = PathBuf::from("/nowhere/in.ndjson");
    let said = place.run("import", &[&missing], "");
    assert!(
        !said.ok && said.err.contains("cannot read /nowhere/in.ndjson"),
        "{}",
        said.err
    );

    let store = place.database.store().await;
    for (command, args) in [
        ("export", vec![Path::new("--out"), &file]),
        ("import", vec![]),
    ] {
        let said = place.run(command, &args, "");
        assert!(!said.ok, "{command}");
        assert!(
            said.err.contains("in use by another process") && said.err.contains("stop"),
            "{}",
            said.err
        );
    }
    store.close().await;
    assert_eq!(
        std::fs::read_to_string(&file).unwrap(),
        "precious",
        "a failed export leaves the earlier file"
    );

    let said = place.run("export", &[Path::new("--tenant"), Path::new("")], "");
    assert!(
        !said.ok && said.err.contains("--tenant: a key must not be empty"),
        "{}",
        said.err
    );
    place.database.execute("DROP TABLE _sqlx_migrations").await;
    let said = place.run("export", &[], "");
    assert!(
        !said.ok && said.err.contains("run `threadkeeper migrate`"),
        "{}",
        said.err
    );
}
