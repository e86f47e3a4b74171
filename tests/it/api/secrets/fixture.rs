//! A gateway with planted secrets, and a search through everything that it writes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::gateway::{Answer, Gateway};
use crate::support::scene::{Backend, Protocol, Scene};
use crate::support::secret_scan::{Needles, planted};

use super::echo_upstream::PARROT_SAYS;
use super::{PLAIN_SECRETS, SECRETS, WORDS, plain_secret, secret, word};

/// Shortest piece of a secret that the search finds, in bytes.
pub(super) const PIECE: usize = 8;
/// The same for hexadecimal secrets, which resemble ids.
const HEX_PIECE: usize = 16;

/// The gateway's files and configuration, and the texts to search for.
pub(super) struct World {
    pub(super) folder: TempDir,
    pub(super) config: String,
    pub(super) env: BTreeMap<&'static str, String>,
    pub(super) secrets: Needles,
    pub(super) words: Needles,
}

impl World {
    pub(super) fn new(scene: &Scene, format: &str, parrot: &str) -> Self {
        let folder = TempDir::new().unwrap();
        for name in ["work", "temp", "given"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let given = |name: &str, text: &str| {
            let path = folder.path().join("given").join(name);
            std::fs::write(&path, format!("{text}\n")).unwrap();
            json!(path.to_str().unwrap())
        };
        let (kind, assistant) = match scene.protocol {
            Protocol::Assistants => ("assistants", "assistant_id = \"asst_test\""),
            _ => ("responses", "model = \"test-model\""),
        };
        let soon = "lock_window = \"50ms\"\nbreaker_min_requests = 0\n";
        let mut config = format!(
            "[log]\nfilter = \"trace\"\nformat = \"{format}\"\n\
             [server]\nshutdown_grace = \"100ms\"\n\
             [runs]\nmax_retries = 0\nsettle_timeout = \"500ms\"\n\
             [store]\nstartup_timeout = \"5s\"\n\
             [auth]\nstored_keys = true\n\
             [auth.keys.backend]\nkey = {backend}\ntenant = \"{tenant}\"\nscope = \"operator\"\n\
             [auth.keys.filed]\nkey_file = {filed}\nscope = \"chat\"\n\
             [auth.jwt]\nissuer = \"https://login.example/\"\naudience = [\"chat\"]\nalgorithms = [\"HS256\"]\n\
             secret_file = {jwt}\n\
             [upstreams.simulated]\nkind = \"{kind}\"\nbase_url = \"{url}\"\n{soon}\
             headers = {{ x-gateway = {header} }}\nquery = {{ code = {query} }}\n\
             [assistants.default]\nupstream = \"simulated\"\n{assistant}\ninstructions = \"Be kind.\"\n\
             [upstreams.down]\nkind = \"{kind}\"\nbase_url = \"http://127.0.0.1:9/v1\"\n{soon}api_key = {key}\n\
             [assistants.down]\nupstream = \"down\"\n{assistant}\n",
            backend = json!(secret("auth.keys.backend")),
            tenant = word("a tenant"),
            filed = given("key", &secret("auth.keys.filed")),
            jwt = given("jwt", &secret("auth.jwt.secret")),
            header = json!(secret("upstreams.simulated.headers")),
            query = json!(secret("upstreams.simulated.query")),
            url = scene.upstream_url,
            key = json!(plain_secret("the parrot's key")),
        );
        for says in PARROT_SAYS {
            config = format!(
                "{config}[upstreams.parrot-{says}]\nkind = \"{kind}\"\nbase_url = \"{parrot}/{says}\"\n{soon}\
                 api_key_file = {key}\n[assistants.parrot-{says}]\nupstream = \"parrot-{says}\"\n{assistant}\n",
                key = given(&format!("parrot-{says}"), &plain_secret("the parrot's key")),
            );
        }
        let mut database = scene.database.url();
        if scene.backend == Backend::Postgres {
            // The server accepts any password from this machine.
            let password = plain_secret("the password");
            database = database.replace("postgres@", &format!("postgres:{password}@"));
            database = format!("{database}&pasword={}", plain_secret("a misspelt password"));
        }
        let env = BTreeMap::from([
            ("DATABASE_URL", database),
            (
                "THREADKEEPER_UPSTREAMS__SIMULATED__API_KEY",
                secret("upstreams.simulated.api_key"),
            ),
        ]);
        let (mut secrets, mut words) = (Needles::default(), Needles::default());
        for name in SECRETS {
            secrets.add(name, &secret(name), PIECE);
        }
        for name in PLAIN_SECRETS {
            secrets.add(name, &planted(name), PIECE);
        }
        for name in WORDS {
            words.add(name, &word(name), PIECE);
        }
        let token = signed(&word("a subject"));
        secrets.add(
            "the signature of a token",
            token.rsplit('.').next().unwrap(),
            PIECE,
        );
        Self {
            folder,
            config,
            env,
            secrets,
            words,
        }
    }

    /// Returns a command of the binary with this configuration, in folders of its own.
    pub(super) fn command(&self, config: &str, args: &[&str]) -> Command {
        let file = self.folder.path().join("given/gateway.toml");
        std::fs::write(&file, config).unwrap();
        let mut command = Gateway::command(args);
        command.arg("--config").arg(file);
        let temp = self.folder.path().join("temp");
        command
            .envs(&self.env)
            .env("TMPDIR", temp)
            .current_dir(self.folder.path().join("work"));
        command.env("RUST_BACKTRACE", "1");
        command
    }

    /// Runs a command. Returns its output, which must contain none of the planted texts.
    pub(super) fn run(&self, args: &[&str]) -> String {
        self.run_with(&self.config, args)
    }

    pub(super) fn run_with(&self, config: &str, args: &[&str]) -> String {
        let Output { stdout, stderr, .. } = self.command(config, args).output().unwrap();
        let text = [stdout, stderr].concat();
        assert_eq!(self.secrets.find(&text), None, "{args:?} prints a secret");
        assert_eq!(
            self.words_but_tenant(&text),
            None,
            "{args:?} prints a caller's text"
        );
        String::from_utf8(text).unwrap()
    }

    /// Searches for callers' texts, but allows the tenant: a list of keys names their tenant.
    pub(super) fn words_but_tenant(&self, text: &[u8]) -> Option<String> {
        let text = String::from_utf8_lossy(text).replace(&word("a tenant"), "");
        self.words.find(text.as_bytes())
    }

    /// Creates a stored key. The command prints it, and from then on the search includes it.
    pub(super) fn make_key(&mut self, scope: &str) -> String {
        let args = ["keys", "create", "--scope", scope, "--label", "a label"];
        let Output {
            stdout,
            stderr,
            status,
        } = self.command(&self.config, &args).output().unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
        let key = String::from_utf8(stdout).unwrap().trim().to_owned();
        self.secrets.add("a recorded key", &key[16..], HEX_PIECE);
        assert_eq!(
            self.secrets.find(&stderr),
            None,
            "keys create prints a secret on standard error"
        );
        key
    }

    /// Starts a gateway whose standard output goes to a file.
    pub(super) async fn serve(&self) -> Gateway {
        let serve = self.command(&self.config, &["serve", "--listen", "127.0.0.1:0"]);
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec \"$@\" > \"$0\""])
            .arg(self.folder.path().join("stdout"));
        command.arg(serve.get_program()).args(serve.get_args());
        for (name, value) in serve.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.current_dir(serve.get_current_dir().unwrap());
        Gateway::spawn(command, TempDir::new().unwrap()).await
    }

    /// Sends a request. The answer may contain the caller's own texts, but no secret.
    pub(super) async fn ask(&self, request: RequestBuilder) -> Answer {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.unwrap();
        for bytes in [format!("{headers:?}").as_bytes(), text.as_bytes()] {
            assert_eq!(
                self.secrets.find(bytes),
                None,
                "an answer contains a secret"
            );
        }
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Answer {
            status,
            headers,
            body,
        }
    }

    pub(super) async fn say(
        &self,
        gateway: &Gateway,
        key: &str,
        user: &str,
        content: &str,
    ) -> Answer {
        let request = gateway.request(Method::POST, &format!("/v1/users/{user}/messages"));
        self.ask(request.bearer_auth(key).json(&json!({"content": content})))
            .await
    }

    /// Searches the gateway's whole log.
    pub(super) fn logged(&self, gateway: &Gateway) {
        let lines = gateway.logs();
        assert!(
            lines.iter().any(|line| line.contains("answered")),
            "the gateway logged nothing"
        );
        for line in lines {
            assert_eq!(
                self.secrets.find(line.as_bytes()),
                None,
                "a secret is logged"
            );
            assert_eq!(
                self.words.find(line.as_bytes()),
                None,
                "a caller's text is logged"
            );
        }
    }

    /// Searches all files that the processes have left, except for the export and their own
    /// input.
    pub(super) fn search_files(&self) {
        let stdout = std::fs::read(self.folder.path().join("stdout")).unwrap();
        assert_eq!(
            String::from_utf8(stdout).unwrap(),
            "",
            "`serve` writes to standard output"
        );
        for name in ["work", "temp"] {
            let files = files_below(&self.folder.path().join(name));
            assert_eq!(
                files,
                Vec::<PathBuf>::new(),
                "the processes left unexpected files"
            );
        }
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}

/// Returns a token of this subject.
pub(super) fn signed(subject: &str) -> String {
    let claims = json!({
        "iss": "https://login.example/", "aud": "chat", "exp": 4_102_444_800_i64, "sub": subject,
    });
    let key = jsonwebtoken::EncodingKey::from_secret(secret("auth.jwt.secret").as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
}
