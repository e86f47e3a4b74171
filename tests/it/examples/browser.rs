//! A browser without a window, steered by `WebDriver`.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};

use crate::support::gateway::PATIENCE;

/// One browser at a time: several of them and the other tests leave each too little of two
/// processors.
static ONLY: Mutex<()> = Mutex::const_new(());

/// Limit of one step. A browser that starts beside all other tests is slow.
const STEP: Duration = PATIENCE.saturating_mul(3);

pub(super) struct Browser {
    _only: MutexGuard<'static, ()>,
    driver: Child,
    session: String,
    client: reqwest::Client,
    _folder: TempDir,
}

impl Browser {
    /// `None`: the test is left out.
    pub(super) async fn start() -> Option<Self> {
        let driver = super::program(&["chromedriver"])?;
        let browser = super::program(&["chromium", "chromium-browser", "google-chrome"])?;
        let only = ONLY.lock().await;
        let folder = TempDir::new().unwrap();
        let mut command = Command::new(driver);
        command
            .arg("--port=0")
            .env("TMPDIR", folder.path())
            .env("HOME", folder.path());
        // In a group of its own, which ends with it.
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut driver = command.spawn().unwrap();
        let mut lines = BufReader::new(driver.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let mut browser_of = Self {
            _only: only,
            driver,
            session: String::new(),
            client: reqwest::Client::builder()
                .no_proxy()
                .timeout(STEP)
                .build()
                .unwrap(),
            _folder: folder,
        };
        let port = tokio::task::spawn_blocking(move || {
            let port = lines.find_map(|line| {
                let (_, port) = line.split_once("successfully on port ")?;
                Some(port.trim_end_matches('.').to_owned())
            });
            // It writes more, and a closed pipe would end it.
            std::thread::spawn(move || lines.for_each(drop));
            port
        });
        let port = port
            .await
            .unwrap()
            .expect("chromedriver says where it listens");
        browser_of.session = format!("http://127.0.0.1:{port}/session");
        // A sandbox needs rights that root in a container does not have. The only page here is ours.
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-extensions",
            "--disable-background-networking",
            "--disable-component-update",
        ];
        let options = json!({"binary": browser, "args": arguments});
        let wanted = json!({"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}});
        let session = browser_of.call(Method::POST, "", &wanted).await;
        browser_of.session = format!(
            "{}/{}",
            browser_of.session,
            session["sessionId"].as_str().unwrap()
        );
        Some(browser_of)
    }

    async fn call(&self, method: Method, path: &str, body: &Value) -> Value {
        let mut request = self
            .client
            .request(method.clone(), format!("{}{path}", self.session));
        if method == Method::POST {
            request = request.json(body);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status();
        let answer: Value = answer.json().await.unwrap();
        assert!(status.is_success(), "{method} {path} {body}: {answer:#}");
        answer["value"].clone()
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        self.call(Method::POST, path, &body).await
    }

    pub(super) async fn open(&self, url: &str) {
        self.post("/url", json!({"url": url})).await;
    }

    pub(super) async fn reload(&self) {
        self.post("/refresh", json!({})).await;
    }

    /// What this expression of JavaScript is in the page.
    pub(super) async fn value(&self, expression: &str) -> Value {
        self.post(
            "/execute/sync",
            json!({"script": format!("return {expression}"), "args": []}),
        )
        .await
    }

    /// Waits until the expression is true.
    pub(super) async fn until(&self, expression: &str) {
        let start = Instant::now();
        while self.value(expression).await != json!(true) {
            let page = self.value("document.body.innerText").await;
            assert!(
                start.elapsed() < STEP,
                "never: {expression}\n{}",
                page.as_str().unwrap_or_default()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn element(&self, css: &str) -> String {
        let found = self
            .post("/element", json!({"using": "css selector", "value": css}))
            .await;
        found
            .as_object()
            .unwrap()
            .values()
            .next()
            .unwrap()
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// Types as a user does; `\u{e007}` is Enter.
    pub(super) async fn type_into(&self, css: &str, text: &str) {
        let element = self.element(css).await;
        self.post(&format!("/element/{element}/value"), json!({"text": text}))
            .await;
    }

    pub(super) async fn click(&self, css: &str) {
        let element = self.element(css).await;
        self.post(&format!("/element/{element}/click"), json!({}))
            .await;
    }

    /// Errors that the page logged since the last call.
    pub(super) async fn console_errors(&self) -> Vec<String> {
        let log = self.post("/se/log", json!({"type": "browser"})).await;
        let errors = log
            .as_array()
            .unwrap()
            .iter()
            .filter(|entry| entry["level"] == "SEVERE");
        errors
            .map(|entry| entry["message"].as_str().unwrap().to_owned())
            .collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let group = self.driver.id().to_string();
        let mut kill = Command::new("kill");
        drop(kill.args(["-KILL", "--", &format!("-{group}")]).status());
        drop(self.driver.wait());
        // Its folder can be removed when nobody writes there any more.
        let start = Instant::now();
        while is_alive(&group) && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Whether a process of this group is more than a zombie, which its parent may leave for long.
fn is_alive(group: &str) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|process| std::fs::read_to_string(process.path().join("stat")).ok())
        .any(|stat| {
            // After the name in parentheses: state, parent, group.
            let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
            let mut fields = fields.split(' ');
            fields.next() != Some("Z") && fields.nth(1) == Some(group)
        })
}
