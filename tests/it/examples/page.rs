//! `chat.html` in a browser, served by `serve.py`.

use std::process::{Child, Command, Stdio};

use serde_json::json;

use super::browser::Browser;
use super::{LONG, SCOPE, cancel, dev, folder, link_to, program, transcript};
use crate::support::gateway::{Gateway, text};
use crate::support::link::{Link, Weather};
use crate::support::scene::{Backend, Protocol, Scene};

const ENTER: &str = "\u{e007}";

/// The text of each message, without the notes below them.
const TEXTS: &str = "[...document.querySelectorAll('li')].map((item) =>
    [...item.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join(''))";

/// Whether the page waits for its user.
const IS_READY: &str = "document.querySelector('#state').textContent === 'Ready'";

fn last_contains(text: &str) -> String {
    format!("({TEXTS}.at(-1) ?? '').includes({})", json!(text))
}

/// `serve.py`.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    /// `None`: the test is left out.
    fn start(gateway: &str) -> Option<Self> {
        use std::io::{BufRead, BufReader};
        let mut command = Command::new(program(&["python3"])?);
        command
            .arg(folder().join("serve.py"))
            .arg("0")
            .env("BASE", gateway);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .trim_start_matches("http://")
            .trim_end_matches('/')
            .to_owned();
        Some(Self { child, address })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A browser at the page, and all that is behind it.
struct Chat {
    browser: Browser,
    link: Link,
    dev: Gateway,
    _server: Server,
}

impl Chat {
    /// `None`: the test is left out.
    async fn open() -> Option<Self> {
        let dev = dev().await;
        let server = Server::start(&format!("http://{}", dev.address()))?;
        let (link, base) = link_to(&server.address).await;
        let browser = Browser::start().await?;
        browser.open(&base).await;
        browser.until(IS_READY).await;
        Some(Self {
            browser,
            link,
            dev,
            _server: server,
        })
    }

    async fn say(&self, text: &str) {
        self.browser
            .type_into("#text", &format!("{text}{ENTER}"))
            .await;
    }

    async fn shown(&self) -> Vec<String> {
        serde_json::from_value(self.browser.value(TEXTS).await).unwrap()
    }

    /// The page shows each message of the transcript once.
    async fn assert_shows_transcript(&self, count: usize) {
        let messages = transcript(&self.dev, SCOPE).await;
        assert_eq!(
            self.shown().await,
            messages.iter().map(text).collect::<Vec<_>>()
        );
        assert_eq!(messages.len(), count);
    }

    async fn until_reply_contains(&self, text: &str) {
        self.browser.until(&last_contains(text)).await;
    }

    /// Waits until much was added to the reply, which began once.
    async fn until_reply_grows(&self) {
        let length = self.shown().await.last().unwrap().len();
        let grows = format!("{TEXTS}.at(-1).length > {}", length + 200);
        self.browser.until(&grows).await;
        let reply = self.shown().await.pop().unwrap();
        assert_eq!(reply.matches("You said").count(), 1, "{reply}");
    }

    /// Presses Stop, and waits for what the page makes of it.
    async fn stop(&self) {
        self.browser.click("#stop").await;
        let is_marked = "document.querySelector('.assistant small')?.textContent === 'stopped'";
        self.browser.until(is_marked).await;
        self.browser.until(IS_READY).await;
    }

    fn disconnect(&self) {
        let refuses = true;
        self.link.valve.set(Weather {
            refuses,
            ..Weather::default()
        });
        self.link.valve.cut();
    }

    /// Connects again, after the page has noticed that the connection was gone.
    async fn reconnect(&self) {
        let is_told = "document.querySelector('#state').textContent.startsWith('No connection')";
        self.browser.until(is_told).await;
        self.link.valve.set(Weather::default());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn message_typed_into_page_gets_reply() {
    let Some(chat) = Chat::open().await else {
        return;
    };
    chat.say("Hello, 世界!").await;
    chat.until_reply_contains("You said: Hello, 世界!. (This is turn 1 of this conversation.)")
        .await;
    chat.browser.until(IS_READY).await;
    chat.assert_shows_transcript(2).await;
    let can_stop = "!document.querySelector('#stop').disabled";
    assert_eq!(chat.browser.value(can_stop).await, json!(false));
    let errors = chat.browser.console_errors().await;
    // A conversation without messages is not found.
    let is_expected = |error: &String| error.contains("404");
    assert!(errors.iter().all(is_expected), "{errors:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_pressed_during_reply_keeps_partial_reply() {
    let Some(chat) = Chat::open().await else {
        return;
    };
    chat.say(LONG).await;
    chat.until_reply_contains("You said").await;
    chat.stop().await;
    chat.assert_shows_transcript(2).await;
    let thread = chat.dev.get(&format!("{SCOPE}/thread")).await.ok();
    assert_eq!(thread["last_run"]["status"], "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn page_reloaded_during_stream_shows_whole_reply() {
    let Some(chat) = Chat::open().await else {
        return;
    };
    chat.say(LONG).await;
    chat.until_reply_contains("You said").await;
    chat.browser.reload().await;
    chat.until_reply_contains("You said").await;
    chat.until_reply_grows().await;
    cancel(&chat.dev).await;
    chat.browser.until(IS_READY).await;
    chat.assert_shows_transcript(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_connection_loses_and_doubles_nothing() {
    let Some(chat) = Chat::open().await else {
        return;
    };
    chat.say(LONG).await;
    chat.until_reply_contains("You said").await;
    chat.disconnect();
    chat.reconnect().await;
    chat.until_reply_grows().await;
    chat.stop().await;
    chat.assert_shows_transcript(2).await;
    // What is sent meanwhile arrives, and once.
    chat.disconnect();
    chat.say("Are you there?").await;
    chat.reconnect().await;
    chat.until_reply_contains("You said: Are you there?").await;
    chat.browser.until(IS_READY).await;
    chat.assert_shows_transcript(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn message_on_busy_thread_follows_chosen_strategy() {
    let Some(chat) = Chat::open().await else {
        return;
    };
    let choose = async |strategy: &str| {
        chat.browser
            .click(&format!("#strategy [value={strategy}]"))
            .await;
    };
    chat.say(LONG).await;
    chat.until_reply_contains("You said").await;

    choose("reject").await;
    chat.say("Are you there?").await;
    chat.browser
        .until("document.querySelector('#error').textContent.includes('busy')")
        .await;
    assert_eq!(
        chat.browser
            .value("document.querySelector('#text').value")
            .await,
        json!("Are you there?")
    );

    choose("enqueue").await;
    chat.say("").await;
    chat.browser
        .until("document.querySelector('#state').textContent.endsWith('1 waiting')")
        .await;
    assert_eq!(
        chat.shown().await.len(),
        3,
        "the waiting message is on the page"
    );
    assert_eq!(
        chat.browser
            .value("document.querySelector('#error').textContent")
            .await,
        json!("")
    );

    choose("rollback").await;
    chat.say("Forget the story.").await;
    chat.until_reply_contains("You said: Are you there?").await;
    chat.browser.until(IS_READY).await;
    assert_eq!(chat.shown().await.len(), 4, "the story is gone");
    chat.assert_shows_transcript(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn page_of_another_origin_talks_to_gateway_with_key() {
    let Some(server) = Server::start("http://127.0.0.1:9") else {
        return;
    };
    let origin = format!("http://{}", server.address);
    let scene = Scene::new(Protocol::Responses, Backend::Sqlite).await;
    let key = "0123456789abcdef0123456789abcdef";
    let more = format!(
        "[server]\ncors_origins = [{origin:?}]\n[auth.keys.page]\nkey = {key:?}\nscope = \"chat\""
    );
    let gateway = scene.gateway_with(&more).await;
    let Some(browser) = Browser::start().await else {
        return;
    };
    browser
        .open(&format!(
            "{origin}/?user=bob&gateway=http://{}",
            gateway.address()
        ))
        .await;
    browser
        .until("document.querySelector('#error').textContent.length > 10")
        .await;
    browser.click("summary").await;
    browser
        .type_into("[name=token]", &format!("{key}{ENTER}"))
        .await;
    browser.until(IS_READY).await;
    browser.type_into("#text", &format!("Hello{ENTER}")).await;
    browser.until(&last_contains("You said: Hello")).await;
    browser.until(IS_READY).await;
    let stored = browser.value("Object.values(sessionStorage)").await;
    assert_eq!(stored, json!([key]));
    assert_eq!(
        browser
            .value("location.href")
            .await
            .as_str()
            .map(|url| url.contains(key)),
        Some(false)
    );
}
