//! The programs of `examples/`, run as a newcomer runs them: against `threadkeeper dev`.

mod browser;
mod page;
mod scripted;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStdout};
use tokio::time::timeout;

use crate::support::gateway::{Gateway, PATIENCE, text};
use crate::support::link::Link;

const SCOPE: &str = "/v1/users/example";

/// A message whose reply takes longer than any test looks at it.
const LONG: &str = "Tell me a story. [[sim: tokens=3000 rate=20ms]]";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")
}

/// Leaves a test out on a newcomer's machine, but not where all tests are asked for.
fn leave_out(why: &str) {
    let asked = ["CI", "THREADKEEPER_TEST_ALL"]
        .into_iter()
        .find(|name| std::env::var_os(name).is_some());
    assert!(
        asked.is_none(),
        "{why}, and {} asks for all tests",
        asked.unwrap_or_default()
    );
    eprintln!("left out: {why}");
}

/// The first of these programs that this machine has.
fn program(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = names
        .iter()
        .flat_map(|name| std::env::split_paths(&path).map(move |it| it.join(name)));
    let found = places.find(|place| place.is_file());
    if found.is_none() {
        leave_out(&format!("there is no {}", names.join(" or ")));
    }
    found
}

async fn dev() -> Gateway {
    let data = TempDir::new().unwrap();
    let mut dev = Gateway::command(&["dev", "--listen", "127.0.0.1:0", "--data"]);
    dev.arg(data.path());
    Gateway::spawn(dev, data).await
}

/// Another way to the gateway, and its URL without the last slash.
async fn link_to(address: &str) -> (Link, String) {
    let link = Link::to_upstream(&format!("http://{address}")).await;
    let base = link.url.trim_end_matches('/').to_owned();
    (link, base)
}

/// Ends the active run, as another client may.
async fn cancel(gateway: &Gateway) {
    let path = format!("{SCOPE}/thread/cancel");
    gateway.post(&path, &json!(null)).await.ok();
}

/// The messages of the transcript, oldest first.
async fn transcript(gateway: &Gateway, scope: &str) -> Vec<Value> {
    let page = gateway
        .get(&format!("{scope}/messages?order=asc&limit=100"))
        .await
        .ok();
    page["data"].as_array().unwrap().clone()
}

/// An example with a command line.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Language {
    Python,
    TypeScript,
}

impl Language {
    /// `None`: the test is left out.
    async fn command(self) -> Option<Command> {
        let words: Vec<OsString> = match self {
            Self::Python => vec![
                program(&["python3"])?.into(),
                folder().join("chat.py").into(),
            ],
            Self::TypeScript => {
                let file = tokio::task::spawn_blocking(compiled).await.unwrap()?;
                // Node 18 has `crypto` behind this option, and newer ones ignore it.
                vec![
                    program(&["node"])?.into(),
                    "--experimental-global-webcrypto".into(),
                    file.into(),
                ]
            }
        };
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .env_remove("TOKEN")
            .env_remove("CHAT_USER")
            .env_remove("SILENCE");
        Some(command)
    }
}

/// Checks the types of `chat.ts`, and that leaving them out makes JavaScript of it. Gives that JavaScript.
fn compiled() -> Option<PathBuf> {
    static COMPILED: OnceLock<Option<PathBuf>> = OnceLock::new();
    let compile = || {
        let npx = program(&["npx"])?;
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("examples");
        let package = std::fs::read_to_string(folder().join("package.json")).unwrap();
        let version =
            serde_json::from_str::<Value>(&package).unwrap()["devDependencies"]["typescript"]
                .take();
        let package = format!("typescript@{}", version.as_str().unwrap());
        let mut compiler = Command::new(npx);
        compiler
            .args(["--yes", "--package", &package, "tsc", "--project"])
            .arg(folder());
        compiler.arg("--outDir").arg(&place);
        compiler
            .env("npm_config_fetch_retries", "1")
            .env("npm_config_update_notifier", "false");
        let output = compiler.stdin(Stdio::null()).output().unwrap();
        let told = [output.stdout, output.stderr].concat();
        let told = String::from_utf8_lossy(&told);
        assert!(!told.contains("error TS"), "{told}");
        if !output.status.success() {
            leave_out(&format!("npx cannot run {package}: {told}"));
            return None;
        }
        std::fs::write(place.join("package.json"), r#"{"type": "module"}"#).unwrap();
        Some(place.join("chat.js"))
    };
    COMPILED.get_or_init(compile).clone()
}

/// An example that runs.
struct Running {
    child: Child,
    stdout: ChildStdout,
    printed: String,
}

impl Running {
    fn start(command: Command) -> Self {
        let mut command = tokio::process::Command::from(command);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        Self {
            child,
            stdout,
            printed: String::new(),
        }
    }

    async fn until_longer(&mut self, bytes: usize) {
        while self.printed.len() < bytes {
            self.read().await;
        }
    }

    /// Reads on until all of this was printed.
    async fn until(&mut self, wanted: &str) {
        while !self.printed.contains(wanted) {
            self.read().await;
        }
    }

    async fn read(&mut self) {
        let read = timeout(PATIENCE, self.stdout.read_u8()).await;
        let read = read.expect("the example goes on");
        let byte = read.unwrap_or_else(|_| panic!("only printed {:?}", self.printed));
        self.printed.push(byte.into());
    }

    fn interrupt(&self) {
        let id = self.child.id().unwrap().to_string();
        assert!(
            Command::new("kill")
                .args(["-INT", &id])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Exit code, and what was printed to either stream.
    async fn end(mut self) -> (Option<i32>, String, String) {
        let mut rest = Vec::new();
        timeout(PATIENCE, self.stdout.read_to_end(&mut rest))
            .await
            .expect("the example ends")
            .unwrap();
        let output = timeout(PATIENCE, self.child.wait_with_output())
            .await
            .unwrap()
            .unwrap();
        let printed = self.printed + std::str::from_utf8(&rest).unwrap();
        (
            output.status.code(),
            printed,
            String::from_utf8(output.stderr).unwrap(),
        )
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shell_example_shows_each_call_and_erases_its_user() {
    let dev = dev().await;
    let mut script = Command::new("sh");
    script
        .arg(folder().join("chat.sh"))
        .env("BASE", format!("http://{}", dev.address()));
    script.env_remove("TOKEN").env_remove("CHAT_USER");
    let (code, printed, told) = Running::start(script).end().await;
    assert_eq!(code, Some(0), "{printed}{told}");
    let steps: Vec<_> = printed.split("\n== ").collect();
    assert_eq!(steps.len(), 11, "{printed}");
    for (step, shows) in [
        (1, "You said: Hello, I am Alice."),
        (2, "event: run.completed"),
        (3, r#""status":"in_progress""#),
        (4, "event: message.delta"),
        (5, "urn:threadkeeper:problem:thread-busy"),
        (6, r#""status":"queued""#),
        (7, r#""status":"cancelled""#),
        (8, "You said: Only once."),
        (9, "You said: And then?"),
        (10, r#""threads_done":1"#),
    ] {
        assert!(
            steps[step].contains(shows),
            "step {step} does not show {shows}: {printed}"
        );
    }
    assert_eq!(
        steps[9].matches("You said: Only once.").count(),
        1,
        "{printed}"
    );
    let answer = dev.get("/v1/users/curl-example/thread").await;
    assert_eq!(answer.problem(), (404, "not-found"));
}

#[test]
fn readme_names_each_program() {
    let readme = std::fs::read_to_string(folder().join("README.md")).unwrap();
    for entry in std::fs::read_dir(folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_program = [".sh", ".py", ".ts", ".html"]
            .iter()
            .any(|end| name.ends_with(end));
        assert!(
            !is_program || readme.contains(&name),
            "README.md does not name {name}"
        );
    }
}

async fn message_gets_reply(language: Language) {
    let Some(mut command) = language.command().await else {
        return;
    };
    let dev = dev().await;
    command
        .env("BASE", format!("http://{}", dev.address()))
        .arg("Hello, 世界!");
    let (code, printed, told) = Running::start(command).end().await;
    assert_eq!((code, told.as_str()), (Some(0), ""), "{printed}");
    assert_eq!(
        printed,
        "You said: Hello, 世界!. (This is turn 1 of this conversation.)\n"
    );
    let messages = transcript(&dev, SCOPE).await;
    let texts: Vec<_> = messages.iter().map(text).collect();
    assert_eq!(texts, ["Hello, 世界!", printed.trim_end()]);
}

async fn broken_connection_loses_and_doubles_nothing(language: Language) {
    let Some(mut command) = language.command().await else {
        return;
    };
    let dev = dev().await;
    let (link, base) = link_to(dev.address()).await;
    command.env("BASE", base).arg(LONG);
    let mut example = Running::start(command);
    for words in [
        "said: ",
        "story went on",
        "went on for long and so the story went on",
    ] {
        example.until(words).await;
        link.valve.cut();
    }
    let before = example.printed.len();
    example.until_longer(before + 200).await;
    cancel(&dev).await;
    let (code, printed, told) = example.end().await;
    assert_eq!((code, told.trim()), (Some(1), "(cancelled)"), "{printed}");
    let messages = transcript(&dev, SCOPE).await;
    let texts: Vec<_> = messages.iter().map(|it| text(it).trim_end()).collect();
    assert_eq!(texts, [LONG, printed.trim_end()]);
}

async fn interrupt_from_keyboard_cancels_run(language: Language) {
    let Some(mut command) = language.command().await else {
        return;
    };
    let dev = dev().await;
    command
        .env("BASE", format!("http://{}", dev.address()))
        .arg(LONG);
    let mut example = Running::start(command);
    example.until("said: ").await;
    example.interrupt();
    let (code, printed, told) = example.end().await;
    assert_eq!((code, told.trim()), (Some(1), "(cancelled)"), "{printed}");
    let thread = dev.get(&format!("{SCOPE}/thread")).await.ok();
    assert_eq!(
        (&thread["state"], &thread["last_run"]["status"]),
        (&json!("idle"), &json!("cancelled"))
    );
    let reply = &transcript(&dev, SCOPE).await[1];
    assert_eq!(reply["incomplete_reason"], "cancelled");
    assert!(
        text(reply).starts_with(printed.trim_end()),
        "{printed}: {reply:#}"
    );
}

async fn refusal_is_told_with_its_detail(language: Language) {
    let Some(mut command) = language.command().await else {
        return;
    };
    let dev = dev().await;
    command
        .env("BASE", format!("http://{}", dev.address()))
        .env("CHAT_USER", "..")
        .arg("Hello");
    let (code, printed, told) = Running::start(command).end().await;
    assert_eq!((code, printed.as_str()), (Some(1), ""), "{told}");
    assert!(told.starts_with("40") && told.trim().len() > 10, "{told}");
}

async fn silent_refused_cut_and_moved_requests_are_repeated_well(language: Language) {
    let Some(mut command) = language.command().await else {
        return;
    };
    let gateway = scripted::Gateway::start().await;
    command
        .env("BASE", &gateway.base)
        .env("TOKEN", "secret")
        .env("SILENCE", "1")
        .arg("Hello");
    let (code, printed, told) = Running::start(command).end().await;
    assert_eq!(
        (code, printed.as_str(), told.as_str()),
        (Some(0), "Hello wide world\n", "")
    );
    gateway.assert_asked_well();
}

macro_rules! in_each_language {
    ($($case:ident),+ $(,)?) => {
        in_each_language!(@ python Python [$($case)+]);
        in_each_language!(@ typescript TypeScript [$($case)+]);
    };
    (@ $module:ident $language:ident [$($case:ident)+]) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $case() {
                    super::$case(super::Language::$language).await;
                }
            )+
        }
    };
}

in_each_language!(
    message_gets_reply,
    broken_connection_loses_and_doubles_nothing,
    interrupt_from_keyboard_cancels_run,
    refusal_is_told_with_its_detail,
    silent_refused_cut_and_moved_requests_are_repeated_well,
);
