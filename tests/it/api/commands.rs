//! All commands except `serve`.

use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::support::gateway::{Gateway, quoted, text};
use crate::support::scene::{Backend, Protocol, Scene};

fn run(command: &mut Command) -> (Output, String) {
    let output = command.output().unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    (output, text)
}

#[test]
fn every_command_prints_help() {
    for name in [
        "dev",
        "serve",
        "simulate",
        "migrate",
        "export",
        "import",
        "keys",
        "fingerprint",
        "check-config",
        "health",
    ] {
        let (output, text) = run(&mut Gateway::command(&[name, "--help"]));
        assert!(
            output.status.success() && text.contains("Usage: threadkeeper"),
            "{name}: {text}"
        );
    }
}

#[test]
fn configuration_problems_are_all_reported_at_once() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("gateway.toml");
    let config = "[server]\nlisten = \"0.0.0.0:0\"\nmax_conections = 5\n[runs]\ntimeout = \"soon\"\n\
                  [assistants.default]\nupstream = \"nowhere\"\n";
    std::fs::write(&file, config).unwrap();
    for command in ["serve", "check-config"] {
        let (output, text) = run(Gateway::command(&[command, "--config"]).arg(&file));
        assert!(!output.status.success(), "{command}");
        for problem in [
            "max_conections",
            "max_connections",
            "runs.timeout",
            "assistants.default.upstream",
            "store.url",
            "allow_unauthenticated",
        ] {
            assert!(
                text.contains(problem),
                "{command} does not mention {problem}:\n{text}"
            );
        }
    }
}

#[test]
fn serve_without_upstream_fails() {
    let folder = TempDir::new().unwrap();
    let database = format!("sqlite:{}", folder.path().join("t.db").display());
    let (output, text) = run(Gateway::command(&["serve"]).env("DATABASE_URL", database));
    assert!(!output.status.success());
    assert!(text.contains("upstream"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn serve_without_automatic_migration_requires_migrate_command() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("gateway.toml");
    let empty = format!("sqlite:{}", folder.path().join("empty.db").display());
    let config = scene
        .config("")
        .replace("[store]\n", "[store]\nmigrate_on_start = false\n");
    std::fs::write(&file, config.replace(&scene.database.url(), &empty)).unwrap();
    let with = |command: &str| {
        let mut it = Gateway::command(&[command, "--config"]);
        it.arg(&file);
        it
    };
    let (output, text) = run(with("serve").args(["--listen", "127.0.0.1:0"]));
    assert!(
        !output.status.success() && text.contains("threadkeeper migrate"),
        "{text}"
    );
    for _ in 0..2 {
        let (output, text) = run(&mut with("migrate"));
        assert!(output.status.success(), "{text}");
    }
    let mut serve = with("serve");
    serve.args(["--listen", "127.0.0.1:0"]);
    let gateway = Gateway::spawn(serve, folder).await;
    gateway.say("/v1/users/alice", "hi").await;
}

/// Runs `check-config --probe` with this configuration. Returns whether it succeeded, and its
/// output.
fn probe(config: &str) -> (bool, String) {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("gateway.toml");
    std::fs::write(&file, config).unwrap();
    let (output, text) = run(Gateway::command(&["check-config", "--probe", "--config"]).arg(&file));
    (output.status.success(), text)
}

#[tokio::test(flavor = "multi_thread")]
async fn probe_reports_upstream_capabilities_and_cleans_up() {
    for (protocol, capabilities) in [
        (
            Protocol::Assistants,
            &["models", "threads", "deletion of threads"][..],
        ),
        (
            Protocol::Responses,
            &[
                "models",
                "conversations",
                "items of conversations",
                "deletion of conversations",
                "stored responses",
                "deletion of responses",
            ],
        ),
        (
            Protocol::Chain,
            &["models", "stored responses", "deletion of responses"],
        ),
    ] {
        let scene = Scene::new(protocol, Backend::Sqlite).await;
        let (is_usable, text) = probe(&scene.config(""));
        assert!(is_usable, "{text}");
        let told: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("upstreams."))
            .collect();
        let expected: Vec<_> = capabilities
            .iter()
            .map(|capability| format!("upstreams.simulated: {capability}: works"))
            .collect();
        assert_eq!(told, expected, "{text}");
        assert_eq!(
            (scene.upstream_threads(), scene.simulator.stored_responses()),
            (vec![], vec![])
        );

        // A server that cannot delete is reported, but can be used.
        for on in ["delete_thread", "delete_conversation", "delete_response"] {
            scene.fault(on, "status=405 wording=detail", 10);
        }
        let (is_usable, text) = probe(&scene.config(""));
        assert!(
            is_usable && text.contains("deletion of") && text.contains(": not supported; "),
            "{text}"
        );
        for id in scene.upstream_threads() {
            assert!(
                text.contains(&id),
                "the output names what stays upstream: {text}"
            );
        }
        scene.simulator.clear_faults();

        let (is_usable, text) = probe(&scene.config("").replace("sk-planted-key", "bad-key"));
        assert!(
            !is_usable && text.contains("wrong key") && text.contains("api_key"),
            "{text}"
        );
        assert!(!text.contains("bad-key"), "{text}");

        let silent =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        silent
            .bind(
                &"127.0.0.1:0"
                    .parse::<std::net::SocketAddr>()
                    .unwrap()
                    .into(),
            )
            .unwrap();
        let nobody = format!(
            "http://{}/v1",
            silent.local_addr().unwrap().as_socket().unwrap()
        );
        let (is_usable, text) = probe(&scene.config("").replace(&scene.upstream_url, &nobody));
        assert!(
            !is_usable && text.contains("unreachable: ") && text.contains("refused"),
            "{text}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn probe_suggests_setting_when_conversations_unsupported() {
    let scene = Scene::new(Protocol::Chain, Backend::Sqlite).await;
    let config = scene.config("");
    let (is_usable, text) = probe(&config.replace("conversations = false", ""));
    assert!(!is_usable, "{text}");
    assert!(
        text.contains("upstreams.simulated: conversations: not supported; "),
        "{text}"
    );
    assert!(text.contains("`conversations = false`"), "{text}");
    let (is_usable, text) = probe(&config);
    assert!(is_usable, "{text}");
    let (is_usable, text) = probe(&config.replace("/v1\"", "/v2\""));
    assert!(
        !is_usable
            && text.contains(
                "the server knows none of the paths: check `upstreams.simulated.base_url`"
            ),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn dev_conversation_survives_restart() {
    let folder = TempDir::new().unwrap();
    let data = folder.path().join("data");
    let start = async || {
        let mut dev = Gateway::command(&["dev", "--listen", "127.0.0.1:0", "--data"]);
        dev.arg(&data);
        Gateway::spawn(dev, TempDir::new().unwrap()).await
    };
    let mut dev = start().await;
    let answer = dev.say("/v1/users/alice", "Hello").await;
    assert!(text(&answer["message"]).contains("Hello"));
    let answer = dev
        .post(
            "/v1/users/bob/messages",
            &serde_json::json!({"content": "Hi", "assistant": "assistants-v2"}),
        )
        .await;
    assert!(
        text(&answer.ok()["message"]).contains("Hi"),
        "the other protocol can be tried, too"
    );
    dev.terminate();
    assert!(dev.exit().await.success());
    let dev = start().await;
    let answer = dev.say("/v1/users/alice", "again").await;
    assert_eq!(
        answer["thread"]["message_count"], 4,
        "the conversation continues: {answer:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn health_reports_whether_gateway_is_alive() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway().await;
    let health = |listen: &str| {
        let mut command = Gateway::command(&["health"]);
        command.env("THREADKEEPER_SERVER__LISTEN", listen);
        run(&mut command).0.status.success()
    };
    assert!(health(gateway.address()));
    // This socket occupies the port without listening, so that no other process can listen there.
    let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    silent
        .bind(
            &"127.0.0.1:0"
                .parse::<std::net::SocketAddr>()
                .unwrap()
                .into(),
        )
        .unwrap();
    assert!(!health(
        &silent
            .local_addr()
            .unwrap()
            .as_socket()
            .unwrap()
            .to_string()
    ));
}

/// Container set-ups often have the key in the environment and the rest in a file.
const KEY: (&str, &str) = ("THREADKEEPER_UPSTREAMS__OPENAI__API_KEY", "sk-1");

#[tokio::test(flavor = "multi_thread")]
async fn health_needs_only_listen_address() {
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let gateway = scene.gateway().await;
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("gateway.toml");
    let listen = format!("[server]\nlisten = \"{}\"\n", gateway.address());
    for broken in [
        "",
        "[runs]\nmax_queue = \"many\"\n",
        "[stor]\nurl = 5\n",
        "this is not TOML\n",
    ] {
        std::fs::write(&file, format!("{listen}{broken}")).unwrap();
        let mut health = Gateway::command(&["health", "--config"]);
        let (output, text) = run(health
            .arg(&file)
            .env(KEY.0, KEY.1)
            .env("DATABASE_URL", "nonsense"));
        assert!(output.status.success(), "{broken}: {text}");
    }
    let mut without_file = Gateway::command(&["health"]);
    without_file
        .env(KEY.0, KEY.1)
        .env("THREADKEEPER_SERVER__LISTEN", gateway.address());
    assert!(
        run(&mut without_file).0.status.success(),
        "{:?}",
        run(&mut without_file)
    );

    std::fs::write(&file, "[server]\nlisten = \"nowhere\"\n").unwrap();
    let (output, text) = run(Gateway::command(&["health", "--config"]).arg(&file));
    assert!(
        !output.status.success() && text.contains("server.listen"),
        "{text}"
    );
    let (output, text) =
        run(Gateway::command(&["health", "--config", "missing.toml"]).env(KEY.0, KEY.1));
    assert!(
        !output.status.success() && text.contains("missing.toml cannot be read"),
        "{text}"
    );
}

/// Settings that a command does not use may be wrong, as long as the sources could be read.
/// Settings from half of the sources could mean something else.
#[test]
fn commands_require_only_settings_they_use() {
    let folder = TempDir::new().unwrap();
    let database = format!("sqlite:{}", folder.path().join("t.db").display());
    let file = folder.path().join("gateway.toml");
    let rest = "[upstreams.openai]\nkind = \"responses\"\nbase_url = \"https://api.openai.com/v1\"\n\
                api_key_file = \"/run/secrets/of-another-container\"\n";
    std::fs::write(&file, format!("[store]\nurl = \"{database}\"\n{rest}")).unwrap();
    for command in [
        &["migrate"][..],
        &["keys", "list"],
        &["export"],
        &["keys", "create"],
    ] {
        let (output, text) = run(Gateway::command(command).arg("--config").arg(&file));
        assert!(output.status.success(), "{command:?}: {text}");
        let mut without_file = Gateway::command(command);
        without_file
            .env_remove("THREADKEEPER_CONFIG")
            .env("DATABASE_URL", &database)
            .env(KEY.0, KEY.1);
        let (output, text) = run(&mut without_file);
        assert!(!output.status.success(), "{command:?}: {text}");
        assert!(
            text.contains("No file was read: name one with --config or THREADKEEPER_CONFIG"),
            "{text}"
        );
        assert!(text.contains("/etc/threadkeeper/gateway.toml"), "{text}");
        let mut alone = Gateway::command(command);
        let (output, text) = run(alone.env("DATABASE_URL", &database));
        assert!(
            output.status.success(),
            "a variable may have any value: {text}"
        );
    }
    std::fs::write(
        &file,
        format!("[store]\nurl = \"{database}\"\ntranscirpt = \"off\"\n{rest}"),
    )
    .unwrap();
    let (output, text) = run(Gateway::command(&["keys", "list", "--config"]).arg(&file));
    assert!(
        !output.status.success() && text.contains("did you mean `transcript`"),
        "{text}"
    );
}

/// `threadkeeper keys list | head` closes its output early.
#[test]
fn closed_stdout_does_not_fail_commands() {
    let folder = TempDir::new().unwrap();
    let database = format!("sqlite:{}", folder.path().join("t.db").display());
    let file = folder.path().join("gateway.toml");
    let config = format!(
        "[store]\nurl = \"{database}\"\n[upstreams.u]\nkind = \"responses\"\nbase_url = \"http://127.0.0.1:9/v1\"\n\
         [assistants.default]\nupstream = \"u\"\nmodel = \"m\"\n"
    );
    std::fs::write(&file, config).unwrap();
    for command in [
        &["migrate"][..],
        &["keys", "create"],
        &["keys", "list"],
        &["export"],
        &["check-config"],
        &["--help"],
        &["--version"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command_line = Gateway::command(command);
        if !command[0].starts_with("--") {
            command_line.arg("--config").arg(&file);
        }
        let output = command_line
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {told}");
        assert!(
            !told.contains("panic") && !told.contains("pipe"),
            "{command:?}: {told}"
        );
    }
}

#[test]
fn missing_config_file_is_the_only_reported_problem() {
    let folder = TempDir::new().unwrap();
    let missing = folder.path().join("missing.toml");
    for command in [
        &["serve"][..],
        &["check-config"],
        &["migrate"],
        &["keys", "list"],
        &["import", "-"],
    ] {
        let (output, text) = run(Gateway::command(command)
            .arg("--config")
            .arg(&missing)
            .env(KEY.0, KEY.1));
        assert!(!output.status.success());
        assert!(
            text.contains("1 problem") && text.contains("missing.toml"),
            "{text} {}",
            quoted(&missing)
        );
    }
}

#[test]
fn check_config_warns_about_doubtful_settings_and_succeeds() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("gateway.toml");
    let config = "[store]\nurl = \"sqlite:t.db\"\n[upstreams.openai]\nkind = \"responses\"\n\
                  base_url = \"https://api.openai.com/v1\"\n[assistants.default]\nupstream = \"openai\"\nmodel = \"m\"\n\
                  tools = [{ type = \"websearch\" }]\n";
    std::fs::write(&file, config).unwrap();
    let (output, text) = run(Gateway::command(&["check-config", "--config"]).arg(&file));
    assert!(
        output.status.success() && text.contains("the configuration is sound"),
        "{text}"
    );
    assert!(
        text.contains("warning: upstreams.openai.api_key: is missing"),
        "{text}"
    );
    assert!(
        text.contains("warning: assistants.default.tools.0: has a `type`"),
        "{text}"
    );
}

#[test]
fn wrong_arguments_are_reported_with_valid_values() {
    let (_, text) = run(&mut Gateway::command(&[
        "keys",
        "create",
        "--scope",
        "superuser",
    ]));
    assert!(text.contains("read, chat, admin, operator"), "{text}");
    for command in ["serve", "dev", "simulate", "health"] {
        let (output, text) = run(&mut Gateway::command(&[
            command,
            "--listen",
            "localhost:8080",
        ]));
        assert!(
            !output.status.success() && text.contains("\"0.0.0.0:8080\" for all"),
            "{text}"
        );
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = TempDir::new().unwrap();
    let mut dev = Gateway::command(&[
        "dev",
        "--listen",
        &taken.local_addr().unwrap().to_string(),
        "--data",
    ]);
    let (output, text) = run(dev.arg(folder.path()));
    assert!(
        !output.status.success() && text.contains("(--listen"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn dev_on_public_address_warns_of_open_access() {
    let folder = TempDir::new().unwrap();
    let mut dev = Gateway::command(&["dev", "--listen", "0.0.0.0:0", "--data"]);
    dev.arg(folder.path());
    let dev = Gateway::spawn(dev, TempDir::new().unwrap()).await;
    dev.say("/v1/users/alice", "Hello").await;
    assert!(
        dev.logs()
            .iter()
            .any(|line| line.contains("callers on other machines are served"))
    );
    let banner = threadkeeper::dev::banner("0.0.0.0:8080".parse().unwrap(), folder.path());
    assert!(
        banner.contains("OPEN TO OTHERS") && banner.contains("http://127.0.0.1:8080/v1"),
        "{banner}"
    );
    let banner = threadkeeper::dev::banner("127.0.0.1:8080".parse().unwrap(), folder.path());
    assert!(!banner.contains("OPEN TO OTHERS"), "{banner}");
}

/// Returns the lines of a text that begin with `curl`, with this gateway's address instead of the
/// documented one.
fn curl_lines(text: &str, address: &str) -> Vec<String> {
    let lines = text
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("curl "));
    lines
        .map(|line| line.replace("127.0.0.1:8080", address))
        .collect()
}

/// Runs the commands of a newcomer as they are written: those of the README, of the pages about
/// the API, and of `dev`.
#[tokio::test(flavor = "multi_thread")]
async fn documented_curl_commands_work() {
    let (curl, _) = run(Command::new("curl").arg("--version"));
    assert!(
        curl.status.success(),
        "this test needs curl, as the README does"
    );
    let folder = TempDir::new().unwrap();
    let data = folder.path().join("data");
    let mut dev = Gateway::command(&["dev", "--listen", "127.0.0.1:0", "--data"]);
    dev.arg(&data);
    let dev = Gateway::spawn(dev, TempDir::new().unwrap()).await;
    // The order matters: one page deletes what the next one creates again.
    let pages = [
        include_str!("../../../README.md"),
        include_str!("../../../docs/idempotency.md"),
        include_str!("../../../docs/events.md"),
        include_str!("../../../docs/http-api.md"),
    ]
    .concat();
    let banner = threadkeeper::dev::banner(dev.address().parse().unwrap(), &data);
    let lines = [
        curl_lines(&pages, dev.address()),
        curl_lines(&banner, dev.address()),
    ]
    .concat();
    assert!(lines.len() >= 24, "{lines:#?}");
    for line in lines {
        let output = Command::new("sh")
            .args(["-c", &format!("{line} --silent --fail --max-time 20")])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{line}: {text}");
        if line.contains("/export") {
            assert!(
                text.lines().last().unwrap().starts_with(r#"{"type":"end""#),
                "{line}: {text}"
            );
        } else if line.contains("stream") {
            assert!(
                text.contains("event: message.delta") && text.contains("event: run.completed"),
                "{line}: {text}"
            );
        } else {
            let answer: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert!(
                answer["thread"]["id"].is_string()
                    || answer["data"].is_array()
                    || answer["id"].is_string()
                    || answer["dry_run"] == true,
                "{line}: {text}"
            );
        }
    }
}
