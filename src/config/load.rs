//! The layers: defaults < file < environment < flags. The sources come as values, so that a test never touches the
//! process's own environment.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use secrecy::zeroize::Zeroizing;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::Config;
use super::check;
use super::checker::Checker;
use super::decode::decode;
use super::env;
use super::names::{FILE_SUFFIX, known_settings};
use super::problem::{ConfigProblems, Origin, Problem};
use super::tree::Tree;

/// Where settings are read from.
#[derive(Clone, Default)]
pub struct Sources {
    pub file: Option<ConfigFile>,
    /// Names and values. Those that are not ours are passed over.
    ///
    /// `THREADKEEPER_` + the path in capitals with `__` between levels sets one setting: `THREADKEEPER_STORE__URL`.
    /// Lists and free tables are written as JSON and replace the file's. `DATABASE_URL` stands in for `store.url`.
    /// An empty variable counts as one that is not set.
    pub env: Vec<(String, String)>,
    /// The flag `--listen`.
    pub listen: Option<SocketAddr>,
}

/// A TOML document.
#[derive(Clone)]
pub enum ConfigFile {
    /// It must be there.
    Path(PathBuf),
    /// If it is not there, nothing is written in it.
    IfThere(PathBuf),
    Text {
        name: String,
        text: String,
    },
}

impl fmt::Debug for ConfigFile {
    /// Its name alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) | Self::IfThere(path) => {
                write!(f, "ConfigFile({:?})", path.display().to_string())
            }
            Self::Text { name, .. } => write!(f, "ConfigFile({name:?})"),
        }
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources")
            .field("file", &self.file)
            .field("listen", &self.listen)
            .finish_non_exhaustive()
    }
}

/// The process's environment as [`Sources::env`] takes it. What is not UTF-8 is marked, and refused by the loader if
/// it is one of our variables.
pub fn utf8_variables(
    vars: impl IntoIterator<Item = (OsString, OsString)>,
) -> Vec<(String, String)> {
    vars.into_iter()
        .map(|(name, value)| (utf8(name), utf8(value)))
        .collect()
}

/// Without a copy, if it can be: it may be a secret.
fn utf8(text: OsString) -> String {
    text.into_string()
        .unwrap_or_else(|text| text.to_string_lossy().into_owned())
}

impl Config {
    /// Reads and checks the settings.
    ///
    /// # Errors
    ///
    /// Everything that is wrong, at once.
    pub fn load(sources: Sources) -> Result<Self, ConfigProblems> {
        let loaded = Loaded::new(sources)?;
        loaded.problems.into_result(loaded.config)
    }

    /// The settings for a command that uses only these parts: sections (`store`), or settings (`auth.stored_keys`). What is
    /// wrong with the others is passed over, and they may have their defaults.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with these parts. Everything that is wrong, if no file was read: the environment then has
    /// settings that belong to a file, and the parts may stand in that file, too.
    pub fn load_parts(sources: Sources, parts: &[&str]) -> Result<Self, ConfigProblems> {
        let Loaded {
            config,
            mut problems,
            ..
        } = Loaded::new(sources)?;
        if !problems.without_file {
            problems.retain(|problem| concerns(problem, parts));
        }
        problems.into_result(config)
    }

    /// `server.listen` alone. Whatever else is wrong is passed over: the gateway that listens there may have started before.
    ///
    /// # Errors
    ///
    /// The address cannot be read, or stands in a file that cannot be read.
    pub fn load_listen(sources: Sources) -> Result<SocketAddr, ConfigProblems> {
        let path = ["server", "listen"].map(str::to_owned);
        let Layers {
            tree: written,
            mut problems,
            unread,
        } = Layers::new(sources);
        let mut tree = Tree::empty();
        if let Some(value) = written.get(&path) {
            problems = ConfigProblems::default();
            // Nothing is in the way in an empty tree.
            let _ = tree.insert(&path, value.clone(), written.origin(&path).cloned());
        } else {
            // It may stand where nothing could be read.
            problems.retain(|problem| problem.path.is_empty());
            if let Some(problem) = unread {
                problems.push(problem);
            }
        }
        let config = decode(&mut tree, &mut problems);
        problems.into_result(config.server.listen)
    }

    /// Like [`load`](Self::load), with what only `serve` needs in the same list ([`check_serve`](Self::check_serve)).
    pub fn load_for_serve(sources: Sources) -> Result<Self, ConfigProblems> {
        let mut loaded = Loaded::new(sources)?;
        check::serve(
            &loaded.config,
            &mut Checker {
                tree: &loaded.tree,
                problems: &mut loaded.problems,
            },
        );
        loaded.problems.into_result(loaded.config)
    }

    /// What `serve` needs beyond a sound configuration: a database, an upstream, an assistant, and a listen address
    /// that fits who may call.
    pub fn check_serve(&self) -> Result<(), ConfigProblems> {
        let mut problems = ConfigProblems::default();
        check::serve(
            self,
            &mut Checker {
                tree: &Tree::empty(),
                problems: &mut problems,
            },
        );
        problems.into_result(())
    }
}

/// A configuration that may have problems: what could not be read has its default.
struct Loaded {
    config: Config,
    tree: Tree,
    problems: ConfigProblems,
}

impl Loaded {
    /// # Errors
    ///
    /// The file cannot be read: what else seems wrong then follows from that.
    fn new(sources: Sources) -> Result<Self, ConfigProblems> {
        let Layers {
            mut tree,
            mut problems,
            unread,
        } = Layers::new(sources);
        if let Some(problem) = unread {
            let mut alone = ConfigProblems::default();
            alone.push(problem);
            return Err(alone);
        }
        let mut config = decode(&mut tree, &mut problems);
        let mut checker = Checker {
            tree: &tree,
            problems: &mut problems,
        };
        resolve_files(&mut config, &mut checker);
        check::everything(&config, &mut checker);
        Ok(Self {
            config,
            tree,
            problems,
        })
    }
}

/// What is written in all sources together, before it has types.
struct Layers {
    tree: Tree,
    problems: ConfigProblems,
    /// The file is none of them, for this reason.
    unread: Option<Problem>,
}

impl Layers {
    fn new(sources: Sources) -> Self {
        let (file, unread) = match sources.file.map(read_file).transpose() {
            Ok(file) => (file.flatten(), None),
            Err(problem) => (None, Some(problem)),
        };
        let mut problems = ConfigProblems::default();
        problems.without_file = file.is_none() && unread.is_none();
        let mut tree = Tree::empty();
        if let Some((name, text)) = file {
            let (written, errors) = Tree::from_toml(&name, &text);
            tree = written;
            for error in errors {
                problems.push(error);
            }
        }
        env::overlay(&mut tree, sources.env, &mut problems);
        if let Some(listen) = sources.listen {
            let (path, value) = (
                ["server", "listen"].map(str::to_owned),
                Value::from(listen.to_string()),
            );
            env::put(
                &mut tree,
                &path,
                value,
                Origin::Flag("--listen"),
                &mut problems,
            );
        }
        Self {
            tree,
            problems,
            unread,
        }
    }
}

/// Name and text of a file. `None` if it need not be there, and is not.
fn read_file(file: ConfigFile) -> Result<Option<(String, Zeroizing<String>)>, Problem> {
    let (path, must_be_there) = match file {
        ConfigFile::Text { name, text } => return Ok(Some((name, Zeroizing::new(text)))),
        ConfigFile::Path(path) => (path, true),
        ConfigFile::IfThere(path) => (path, false),
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some((path.display().to_string(), Zeroizing::new(text)))),
        Err(error) if !must_be_there && error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Problem {
            path: String::new(),
            origin: None,
            what: format!("the file {} cannot be read: {error}", path.display()),
            hint: None,
        }),
    }
}

/// The problem has to do with one of the parts: itself, what it holds, what holds it, or what may be meant by a name that is
/// none.
fn concerns(problem: &Problem, parts: &[&str]) -> bool {
    let is_within = |path: &str, part: &str| {
        path.strip_prefix(part)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    let path = problem.path.as_str();
    let is_known = known_settings()
        .iter()
        .any(|setting| is_within(path, &setting[0]));
    !is_known
        || parts
            .iter()
            .any(|part| is_within(path, part) || is_within(part, path))
}

/// Reads the files that hold secrets and keys.
fn resolve_files(config: &mut Config, checker: &mut Checker<'_>) {
    let store = &mut config.store;
    resolve_file(
        &["store", "url"],
        &mut store.url,
        store.url_file.as_ref(),
        checker,
    );
    let direct_file = store.direct_url_file.as_ref();
    resolve_file(
        &["store", "direct_url"],
        &mut store.direct_url,
        direct_file,
        checker,
    );
    for (name, key) in &mut config.auth.keys {
        resolve_file(
            &["auth", "keys", name, "key"],
            &mut key.key,
            key.key_file.as_ref(),
            checker,
        );
    }
    for (name, upstream) in &mut config.upstreams {
        let path = ["upstreams", name, "api_key"];
        resolve_file(
            &path,
            &mut upstream.api_key,
            upstream.api_key_file.as_ref(),
            checker,
        );
    }
    if let Some(jwt) = &mut config.auth.jwt {
        resolve_file(
            &["auth", "jwt", "secret"],
            &mut jwt.secret,
            jwt.secret_file.as_ref(),
            checker,
        );
        let path = ["auth", "jwt", "public_key"];
        resolve_file(
            &path,
            &mut jwt.public_key,
            jwt.public_key_file.as_ref(),
            checker,
        );
    }
}

fn resolve_file(
    path: &[&str],
    secret: &mut Option<SecretString>,
    file: Option<&PathBuf>,
    checker: &mut Checker<'_>,
) {
    let Some(file) = file else { return };
    let field = path.last().copied().unwrap_or_default();
    let file_field = format!("{field}{FILE_SUFFIX}");
    let mut file_path = path.to_vec();
    if let Some(last) = file_path.last_mut() {
        *last = &file_field;
    }
    if secret.is_some() {
        checker.report(
            &file_path,
            format!("{field} is set as well"),
            "keep one of the two",
        );
        return;
    }
    match std::fs::read_to_string(file) {
        Ok(text) => {
            let text = SecretString::from(text);
            let trimmed = text.expose_secret().trim_end_matches(['\n', '\r']);
            if trimmed.trim().is_empty() {
                checker.report(&file_path, "the file is empty", "");
            } else {
                *secret = Some(SecretString::from(trimmed));
            }
        }
        Err(error) => {
            // Its name is not repeated: somebody may have written the secret itself in its place.
            checker.report(&file_path, format!("the file cannot be read: {error}"), "");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::config::names::variable;
    use crate::config::{LogFormat, Synchronous, UpstreamKind};
    use crate::testing::damaged;

    const BOTH: &str = r#"
        [upstreams.openai]
        kind = "responses"
        base_url = "https://api.example.com/v1"
        [assistants.default]
        upstream = "openai"
        model = "m"
    "#;

    fn sources(text: &str, env: &[(&str, &str)]) -> Sources {
        Sources {
            file: Some(ConfigFile::Text {
                name: "g.toml".to_owned(),
                text: text.to_owned(),
            }),
            env: env
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            listen: None,
        }
    }

    fn load(text: &str, env: &[(&str, &str)]) -> Config {
        Config::load(sources(text, env)).unwrap_or_else(|problems| panic!("{problems}"))
    }

    fn problems(text: &str, env: &[(&str, &str)]) -> Vec<String> {
        match Config::load(sources(text, env)) {
            Ok(_) => Vec::new(),
            Err(problems) => problems.iter().map(Problem::to_string).collect(),
        }
    }

    /// One problem, which has all these parts.
    #[track_caller]
    fn assert_one(problems: &[String], parts: &[&str]) {
        assert_eq!(problems.len(), 1, "{problems:#?}");
        for part in parts {
            assert!(
                problems[0].contains(part),
                "{part} is not in: {}",
                problems[0]
            );
        }
    }

    fn secret(secret: Option<&SecretString>) -> Option<&str> {
        secret.map(ExposeSecret::expose_secret)
    }

    #[test]
    fn nothing_written_is_the_default() {
        let config = Config::load(Sources::default()).unwrap();
        assert_eq!(format!("{config:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn the_environment_is_above_the_file_and_flags_are_above_both() {
        let text = "[server]\nlisten = \"127.0.0.1:1\"\nmax_connections = 7\n[runs]\nmax_queue = 9";
        let env = [
            ("THREADKEEPER_SERVER__LISTEN", "127.0.0.1:2"),
            ("THREADKEEPER_RUNS__MAX_QUEUE", "10"),
        ];
        let config = load(text, &env);
        assert_eq!(config.server.listen.port(), 2);
        assert_eq!(config.server.max_connections, 7);
        assert_eq!(config.runs.max_queue, 10);
        let flagged = Sources {
            listen: Some("127.0.0.1:3".parse().unwrap()),
            ..sources(text, &env)
        };
        assert_eq!(Config::load(flagged).unwrap().server.listen.port(), 3);
    }

    #[test]
    fn the_field_decides_what_a_variable_means() {
        let env = [
            ("THREADKEEPER_SERVER__MAX_CONNECTIONS", "10_000"),
            ("THREADKEEPER_SERVER__ALLOW_UNAUTHENTICATED", "True"),
            ("THREADKEEPER_SERVER__STREAM_KEEP_ALIVE", "1m 30s"),
            ("THREADKEEPER_STORE__MIGRATE_ON_START", "0"),
            ("THREADKEEPER_STORE__SYNCHRONOUS", "normal"),
            ("THREADKEEPER_LOG__FORMAT", "json"),
            ("THREADKEEPER_UPSTREAMS__OPENAI__KIND", "responses"),
            (
                "THREADKEEPER_UPSTREAMS__OPENAI__BASE_URL",
                "https://api.example.com/v1",
            ),
            ("THREADKEEPER_UPSTREAMS__OPENAI__API_KEY", "12345"),
            (
                "THREADKEEPER_UPSTREAMS__OPENAI__HEADERS",
                r#"{"X-Org": "o1"}"#,
            ),
            ("THREADKEEPER_UPSTREAMS__OPENAI__QUERY__V", "2"),
            ("THREADKEEPER_ASSISTANTS__DEFAULT__UPSTREAM", "openai"),
            ("THREADKEEPER_ASSISTANTS__DEFAULT__MODEL", "4"),
            ("THREADKEEPER_ASSISTANTS__DEFAULT__TIMEOUT", "5s"),
            (
                "THREADKEEPER_ASSISTANTS__DEFAULT__TOOLS",
                r#"[{"type": "function", "name": "f"}]"#,
            ),
            (
                "THREADKEEPER_ASSISTANTS__DEFAULT__PARAMETERS__TEMPERATURE",
                "0.5",
            ),
            (
                "THREADKEEPER_ASSISTANTS__DEFAULT__PARAMETERS__TRUNCATION",
                "auto",
            ),
        ];
        let config = load("", &env);
        assert_eq!(config.server.max_connections, 10_000);
        assert!(config.server.allow_unauthenticated);
        assert_eq!(config.server.stream_keep_alive, Duration::from_secs(90));
        assert!(!config.store.migrate_on_start);
        assert_eq!(config.store.synchronous, Synchronous::Normal);
        assert_eq!(config.log.format, Some(LogFormat::Json));
        let upstream = &config.upstreams["openai"];
        assert_eq!(upstream.kind, UpstreamKind::Responses);
        assert_eq!(secret(upstream.api_key.as_ref()), Some("12345"));
        assert_eq!(secret(upstream.headers.get("X-Org")), Some("o1"));
        assert_eq!(secret(upstream.query.get("v")), Some("2"));
        let assistant = &config.assistants["default"];
        assert_eq!(assistant.model.as_deref(), Some("4"));
        assert_eq!(assistant.timeout, Some(Duration::from_secs(5)));
        assert_eq!(
            assistant.tools,
            [serde_json::json!({"type": "function", "name": "f"})]
        );
        assert_eq!(
            serde_json::Value::from(assistant.parameters.clone()),
            serde_json::json!({"temperature": 0.5, "truncation": "auto"})
        );
    }

    #[test]
    fn an_empty_variable_is_not_set() {
        let env = [
            ("THREADKEEPER_STORE__URL", ""),
            ("DATABASE_URL", ""),
            ("THREADKEEPER_RUNS__TIMEOUT", ""),
        ];
        let config = load("[store]\nurl = \"sqlite:a.db\"", &env);
        assert_eq!(secret(config.store.url.as_ref()), Some("sqlite:a.db"));
    }

    #[test]
    fn database_url_is_above_the_file_and_below_the_setting_of_its_own() {
        let text = "[store]\nurl = \"sqlite:file.db\"";
        let url = |env: &[(&str, &str)]| {
            secret(load(text, env).store.url.as_ref())
                .map(str::to_owned)
                .unwrap_or_default()
        };
        let database = ("DATABASE_URL", "postgres://u@h/d");
        assert_eq!(url(&[]), "sqlite:file.db");
        assert_eq!(url(&[database]), "postgres://u@h/d");
        assert_eq!(
            url(&[database, ("THREADKEEPER_STORE__URL", "sqlite:own.db")]),
            "sqlite:own.db"
        );
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("url");
        std::fs::write(&file, "sqlite:secret.db\n").unwrap();
        let file = ("THREADKEEPER_STORE__URL_FILE", file.to_str().unwrap());
        assert_eq!(url(&[database, file]), "sqlite:secret.db");
    }

    #[test]
    fn unknown_keys_are_all_found_with_the_nearest_name() {
        let text = r#"
            colour = "red"
            [server]
            lissten = "127.0.0.1:1"
            transcript = "off"
            [upstreams.openai]
            kind = "responses"
            base_url = "https://api.example.com/v1"
            api-key = "hunter2hunter2"
            [assistants.default]
            upstream = "openai"
            model = "m"
            parameters = { anything = 1 }
        "#;
        let found = problems(text, &[("THREADKEEPER_RUNS__MAXQUEUE", "5")]);
        assert_eq!(
            found,
            [
                "colour (g.toml, line 2): there is no such setting",
                "runs.maxqueue (THREADKEEPER_RUNS__MAXQUEUE): there is no such setting; did you mean `max_queue`?",
                "server.lissten (g.toml, line 4): there is no such setting; did you mean `listen`?",
                "server.transcript (g.toml, line 5): there is no such setting; did you mean `store.transcript`?",
                "upstreams.openai.api-key (g.toml, line 9): there is no such setting; did you mean `api_key`?",
            ]
        );
    }

    #[test]
    fn wrong_types_are_all_found_with_what_else_is_wrong() {
        let text = r#"
            stray = 1
            [server]
            listen = "nowhere"
            max_connections = "many"
            stream_keep_alive = 15
            [log]
            format = "jsn"
            [upstreams.a]
            kind = "response"
            base_url = "not a url hunter2"
            [upstreams.b]
            connect_timeout = "soon"
            [assistants.default]
            upstream = 5
        "#;
        let env = [
            ("THREADKEEPER_RUNS__MAX_QUEUE", "-1"),
            ("THREADKEEPER_STORE__MIGRATE_ON_START", "perhaps"),
        ];
        let mut found = problems(text, &env);
        found.sort();
        assert_eq!(
            found,
            [
                "assistants.default.upstream (g.toml, line 15): expected text, found a number",
                "log.format (g.toml, line 8): expected one of \"json\", \"pretty\"; did you mean \"json\"?",
                "runs.max_queue (THREADKEEPER_RUNS__MAX_QUEUE): expected a whole number, 0 or more",
                "server.listen (g.toml, line 4): is no address to listen on; host names are not looked up; \
                 write an IP address and a port: \"127.0.0.1:8080\" for this machine alone, \
                 \"0.0.0.0:8080\" for all interfaces",
                "server.max_connections (g.toml, line 5): expected a whole number, 0 or more",
                "server.stream_keep_alive (g.toml, line 6): expected a duration, found a number; \
                 write it with its unit, such as \"30s\"",
                "store.migrate_on_start (THREADKEEPER_STORE__MIGRATE_ON_START): expected true or false",
                "stray (g.toml, line 2): there is no such setting",
                "upstreams.a.base_url (g.toml, line 11): not a URL: relative URL without a base",
                "upstreams.a.kind (g.toml, line 10): expected one of \"assistants\", \"responses\"; \
                 did you mean \"responses\"?",
                "upstreams.b.base_url: is missing; set it in the file, or as THREADKEEPER_UPSTREAMS__B__BASE_URL",
                "upstreams.b.connect_timeout (g.toml, line 13): expected a duration; \
                 write it with its unit, such as \"30s\"",
                "upstreams.b.kind: is missing; set it in the file, or as THREADKEEPER_UPSTREAMS__B__KIND",
            ]
        );
    }

    #[test]
    fn a_table_that_is_no_table_is_one_problem() {
        assert_one(
            &problems("server = 5", &[]),
            &["server (g.toml, line 1): expected a table"],
        );
        assert_one(
            &problems("upstreams = 5", &[]),
            &["upstreams (g.toml, line 1): expected a"],
        );
        let text = format!("{BOTH}\nparameters = 5");
        assert_one(
            &problems(&text, &[]),
            &[
                "assistants.default.parameters",
                "expected a table, found a number",
            ],
        );
        let env = [
            ("THREADKEEPER_STORE__URL", "sqlite:a"),
            ("THREADKEEPER_STORE__URL__HOST", "b"),
        ];
        assert_one(
            &problems("", &env),
            &["store.url.host (THREADKEEPER_STORE__URL__HOST): store.url has no fields"],
        );
    }

    #[test]
    fn a_list_in_place_of_a_table_is_one_problem() {
        let expected = "expected a table of settings, each with its own name, found a list";
        let text =
            "server = [\"127.0.0.1:1\"]\n[[auth.keys.a]]\nscope = \"chat\"\n[[upstreams.openai]]";
        let found = problems(text, &[]);
        for (problem, begin) in found.iter().zip([
            "auth.keys.a (g.toml, line 2)",
            "server (g.toml, line 1)",
            "upstreams.openai (g.toml, line 4)",
        ]) {
            assert_eq!(*problem, format!("{begin}: {expected}"));
        }
        assert_eq!(found.len(), 3, "{found:#?}");
        assert_one(
            &problems("[[limits]]", &[]),
            &["limits (g.toml, line 1)", expected],
        );
    }

    #[test]
    fn a_missing_field_hides_no_unknown_one() {
        let found = problems("[auth.keys.a]\nkeyy = 1", &[]);
        assert_eq!(found.len(), 2, "{found:#?}");
        assert!(found[0].contains("did you mean `key`?"), "{}", found[0]);
        assert!(
            found[1].starts_with("auth.keys.a.scope: is missing"),
            "{}",
            found[1]
        );
    }

    #[test]
    fn a_word_of_another_type_is_refused_with_the_known_words() {
        for value in ["5", "[]", "{}", "{ json = 1 }", "{ a = 1, b = 2 }", "true"] {
            let found = problems(&format!("[log]\nformat = {value}"), &[]);
            assert_one(
                &found,
                &["log.format (g.toml, line 2): expected one of \"json\", \"pretty\""],
            );
        }
        let text = "[auth.jwt]\nissuer = \"i\"\naudience = [\"a\"]\njwks_url = \"https://h\"\nalgorithms = [[]]";
        let begin = "auth.jwt.algorithms.0 (g.toml, line 5): expected one of \"HS256\"";
        assert_one(&problems(text, &[]), &[begin]);
        let env = [
            ("THREADKEEPER_LOG__FORMAT", " pretty\n"),
            ("THREADKEEPER_SESSIONS__TTL_FROM", "5"),
        ];
        assert_one(
            &problems("", &env),
            &["TTL_FROM): expected one of \"creation\", \"last_activity\""],
        );
    }

    #[test]
    fn numbers_out_of_range_are_refused_with_the_range() {
        let text = "[server]\nmax_readers_per_run = 0\nmax_page_size = 4294967296\nmax_connections = -1\nmax_key_bytes = 0.5\n\
                    max_body_bytes = 99999999999999999999\n[threads]\nmax_messages = nan";
        let env = [
            ("THREADKEEPER_RUNS__MAX_RETRIES", "4294967296"),
            ("THREADKEEPER_RUNS__MAX_RUNS", "0"),
        ];
        let found = problems(text, &env);
        assert_eq!(
            found,
            [
                "runs.max_retries (THREADKEEPER_RUNS__MAX_RETRIES): expected a whole number from 0 to 4294967295",
                "runs.max_runs (THREADKEEPER_RUNS__MAX_RUNS): expected a whole number, 1 or more",
                "server.max_body_bytes (g.toml, line 6): expected a whole number, 0 or more, found a number",
                "server.max_connections (g.toml, line 4): expected a whole number, 0 or more",
                "server.max_key_bytes (g.toml, line 5): expected a whole number, 0 or more, found a number",
                "server.max_page_size (g.toml, line 3): expected a whole number from 0 to 4294967295",
                "server.max_readers_per_run (g.toml, line 2): expected a whole number, 1 or more",
                "threads.max_messages (g.toml, line 8): expected a whole number, 1 or more, found a number",
            ]
        );
    }

    #[test]
    fn json_variables_that_are_no_json_are_refused() {
        let name = "THREADKEEPER_ASSISTANTS__DEFAULT__TOOLS";
        assert_one(
            &problems(BOTH, &[(name, "[{")]),
            &[name, "expected a list written as JSON"],
        );
        let name = "THREADKEEPER_UPSTREAMS__OPENAI__HEADERS";
        assert_one(
            &problems(BOTH, &[(name, r#"{"a": 5}"#)]),
            &[name, "upstreams.openai.headers.a", "expected text"],
        );
        let name = "THREADKEEPER_UPSTREAMS__OPENAI";
        assert_one(
            &problems("", &[(name, "{}")]),
            &[name, "expected a table of settings"],
        );
    }

    #[test]
    fn variables_with_one_underscore_are_refused_with_the_right_spelling() {
        for (name, hint) in [
            (
                "THREADKEEPER_STORE_URL",
                "did you mean THREADKEEPER_STORE__URL?",
            ),
            (
                "THREADKEEPER_LISTEN",
                "did you mean THREADKEEPER_SERVER__LISTEN?",
            ),
            (
                "THREADKEEPER_UPSTREAMS_OPENAI_API_KEY",
                "did you mean THREADKEEPER_UPSTREAMS__OPENAI__API_KEY?",
            ),
            (
                "THREADKEEPER_WHATEVER",
                "a setting is named like THREADKEEPER_STORE__URL",
            ),
        ] {
            assert_one(
                &problems("", &[(name, "hunter2")]),
                &[name, "two underscores", hint],
            );
        }
        assert_one(
            &problems("", &[("THREADKEEPER_STORE__", "x")]),
            &["an empty level"],
        );
        let twice = [
            ("THREADKEEPER_RUNS__MAX_QUEUE", "1"),
            ("THREADKEEPER_RUNS__max_queue", "2"),
        ];
        assert_one(
            &problems("", &twice),
            &["sets the same as THREADKEEPER_RUNS__MAX_QUEUE"],
        );
    }

    #[test]
    fn what_an_orchestrator_injects_is_passed_over() {
        let env = [
            ("THREADKEEPER_CONFIG", "/etc/g.toml"),
            ("THREADKEEPER_SERVICE_HOST", "10.0.0.1"),
            ("THREADKEEPER_SERVICE_PORT", "8080"),
            ("THREADKEEPER_SERVICE_PORT_HTTP", "8080"),
            ("THREADKEEPER_PORT", "tcp://10.0.0.1:8080"),
            ("THREADKEEPER_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
            ("THREADKEEPER_PORT_8080_TCP_ADDR", "10.0.0.1"),
            ("THREADKEEPER_POSTGRES_SERVICE_HOST", "10.0.0.2"),
            ("THREADKEEPER_POSTGRES_SERVICE_PORT_SQL", "5432"),
            ("THREADKEEPER_POSTGRES_PORT", "tcp://10.0.0.2:5432"),
            ("THREADKEEPER_POSTGRES_PORT_5432_TCP_PROTO", "tcp"),
            ("SOMETHING_ELSE", "x"),
        ];
        load("", &env);
        assert_one(
            &problems("", &[("THREADKEEPER_STORE_PORT", "5432")]),
            &["THREADKEEPER_STORE_PORT"],
        );
    }

    #[test]
    fn keys_are_read_from_files() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (good, empty) = (file("good", "hunter2\r\n"), file("empty", "\n"));
        let missing = folder.path().join("missing").to_str().unwrap().to_owned();
        let name = "THREADKEEPER_UPSTREAMS__OPENAI__API_KEY_FILE";
        let key = |config: &Config| {
            secret(config.upstreams["openai"].api_key.as_ref()).map(str::to_owned)
        };

        assert_eq!(
            key(&load(BOTH, &[(name, &good)])).as_deref(),
            Some("hunter2")
        );
        assert_one(&problems(BOTH, &[(name, &empty)]), &[name, "is empty"]);
        assert_one(
            &problems(BOTH, &[(name, &missing)]),
            &[name, "cannot be read"],
        );
        assert!(
            !problems(BOTH, &[(name, "hunter2hunter2")])[0].contains("hunter2"),
            "not a file, but the key"
        );

        // Within one layer they contradict each other; a higher layer replaces both.
        let plain = ("THREADKEEPER_UPSTREAMS__OPENAI__API_KEY", "other");
        assert_one(
            &problems(BOTH, &[(name, &good), plain]),
            &[name, "api_key is set as well"],
        );
        let in_file = BOTH.replace("[assistants", "api_key = \"in file\"\n[assistants");
        assert_eq!(
            key(&load(&in_file, &[(name, &good)])).as_deref(),
            Some("hunter2")
        );
        let in_file = BOTH.replace(
            "[assistants",
            &format!("api_key_file = '{missing}'\n[assistants"),
        );
        assert_eq!(key(&load(&in_file, &[plain])).as_deref(), Some("other"));
    }

    #[test]
    fn secrets_are_in_no_text() {
        const SECRET: &str = "hunter2hunter2";
        let good = r#"
            [store]
            url = "postgres://u:hunter2hunter2@h/d"
            [upstreams.openai]
            kind = "responses"
            base_url = "https://api.example.com/v1"
            api_key = "hunter2hunter2"
            headers = { x-key = "hunter2hunter2" }
            query = { key = "hunter2hunter2" }
            [auth.keys.a]
            key = "hunter2hunter2hunter2hunter2"
            scope = "chat"
            [auth.jwt]
            issuer = "i"
            audience = ["a"]
            algorithms = ["HS256"]
            secret = "hunter2hunter2hunter2hunter2hunter2"
            [assistants.default]
            upstream = "openai"
            model = "m"
        "#;
        let loaded = load(good, &[]);
        assert!(!format!("{loaded:?}").contains(SECRET));
        assert!(!format!("{:?}", loaded.clone()).contains(SECRET));
        let text = ConfigFile::Text {
            name: "g.toml".to_owned(),
            text: good.to_owned(),
        };
        assert!(!format!("{text:?}").contains(SECRET));
        assert!(!format!("{:?}", sources(good, &[("DATABASE_URL", SECRET)])).contains(SECRET));

        let bad = r#"
            [store]
            url = "hunter2hunter2"
            synchronous = "hunter2hunter2"
            [server]
            listen = "hunter2hunter2"
            public_url = "hunter2hunter2"
            max_body_bytes = "hunter2hunter2"
            stream_keep_alive = "hunter2hunter2"
            hunter = "hunter2hunter2"
            [log]
            filter = "hunter2hunter2=hunter2hunter2=,,"
            [upstreams.a]
            kind = "hunter2hunter2"
            base_url = "hunter2hunter2"
            api_key = ["hunter2hunter2"]
            [upstreams.b]
            kind = "responses"
            base_url = "https://u:hunter2hunter2@h/v1"
            api_key = "hunter2hunter2\u0007"
            headers = { a = "hunter2hunter2\u0007", b = ["hunter2hunter2"] }
            [upstreams.c]
            kind = "responses"
            base_url = "https://h:hunter2hunter2/v1"
            [assistants.default]
            upstream = "b"
            model = ["hunter2hunter2"]
            tools = "hunter2hunter2"
            parameters = "hunter2hunter2"
        "#;
        let env = [
            ("THREADKEEPER_API_KEY", SECRET),
            ("THREADKEEPER_RUNS__MAX_QUEUE", SECRET),
            ("THREADKEEPER_RUNS__TIMEOUT", SECRET),
            ("THREADKEEPER_ASSISTANTS__DEFAULT__TOOLS", SECRET),
        ];
        let found = Config::load_for_serve(sources(bad, &env)).unwrap_err();
        assert!(found.len() >= 18, "{found}");
        assert!(!found.to_string().contains(SECRET), "{found}");
        assert!(!format!("{found:?}").contains(SECRET));
        for url in [
            "postgres://u:hunter2hunter2@h:x/d",
            "mysql://hunter2hunter2@h/d",
            "hunter2hunter2",
        ] {
            let found = problems("", &[("DATABASE_URL", url)]);
            assert_one(
                &found,
                &["store.url (DATABASE_URL): is not the URL of a database"],
            );
            assert!(!found[0].contains(SECRET));
        }
    }

    /// Sound, with a secret wherever one can be.
    const WITH_SECRETS: &str = r#"
[store]
url = "postgres://u:hunter2hunter2@h/d"
direct_url = "postgres://u:hunter2hunter2@h/d"
[auth.keys.a]
key = "hunter2hunter2hunter2hunter2"
scope = "chat"
[auth.jwt]
issuer = "i"
audience = ["a"]
algorithms = ["HS256"]
secret = "hunter2hunter2hunter2hunter2hunter2"
[upstreams.openai]
kind = "responses"
base_url = "https://api.example.com/v1"
api_key = "hunter2hunter2"
headers = { x-key = "hunter2hunter2" }
query = { key = "hunter2hunter2" }
[assistants.default]
upstream = "openai"
model = "m"
tools = [{ type = "function", name = "f" }]
"#;

    /// The variable sets what is secret by its name.
    fn is_secret(variable: &str) -> bool {
        let secrets = [
            "__KEY",
            "__API_KEY",
            "__SECRET",
            "__SHA256",
            "__URL",
            "__DIRECT_URL",
            "__QUERY",
            "__HEADERS",
        ];
        variable == "DATABASE_URL" || secrets.iter().any(|secret| variable.ends_with(secret))
    }

    /// It is a configuration, or has problems; and no text of either has a secret in it.
    fn is_discreet(text: String, env: &[(String, String)]) -> Result<(), TestCaseError> {
        let file = Some(ConfigFile::Text {
            name: "g.toml".to_owned(),
            text,
        });
        let sources = Sources {
            file,
            env: env.to_vec(),
            ..Sources::default()
        };
        let texts = match Config::load_for_serve(sources) {
            // Who sets what is no secret to one, such as the issuer of tokens, may see it.
            Ok(_)
                if env
                    .iter()
                    .any(|(name, value)| value.contains("unter2h") && !is_secret(name)) =>
            {
                vec![]
            }
            Ok(config) => vec![format!("{config:?}")],
            Err(found) => vec![found.to_string(), format!("{found:?}")],
        };
        for text in texts {
            prop_assert!(!text.contains("unter2h"), "{}", text);
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn a_damaged_file_is_read_or_refused(bytes in damaged(WITH_SECRETS.as_bytes().to_vec())) {
            is_discreet(String::from_utf8_lossy(&bytes).into_owned(), &[])?;
        }

        #[test]
        fn any_variables_are_read_or_refused(
            variables in prop::collection::vec(
                (
                    prop_oneof![
                        prop::sample::select(known_settings()).prop_map(|path| {
                            variable(&path.iter().map(|key| key.replace("<name>", "openai")).collect::<Vec<_>>())
                        }),
                        "THREADKEEPER_[A-Z_]{0,20}(__[A-Z_]{0,8}){0,3}",
                        Just("DATABASE_URL".to_owned()),
                    ],
                    prop_oneof![
                        "(postgres://u:)?hunter2hunter2(@h/d)?\\PC{0,3}",
                        "[\\[{]\"?hunter2hunter2\"?[:,]?.{0,3}[\\]}]?",
                        "[0-9a-z_.-]{0,12}",
                        r#"\["hunter2hunter2", \{"a": "hunter2hunter2"\}\]"#,
                    ],
                ),
                0..6,
            ),
        ) {
            is_discreet(WITH_SECRETS.to_owned(), &variables)?;
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_a_problem_and_not_toml_too() {
        let missing = Sources {
            file: Some(ConfigFile::Path("no/such/file.toml".into())),
            ..Sources::default()
        };
        let found = Config::load(missing).unwrap_err().to_string();
        assert!(
            found.contains("no/such/file.toml cannot be read"),
            "{found}"
        );
        let found = problems(
            "[server]\nlisten = hunter2hunter2\nmax_connections = 0",
            &[],
        );
        assert_eq!(found.len(), 2, "{found:#?}");
        assert!(
            found[0].starts_with("g.toml, line 2: this is not TOML"),
            "{}",
            found[0]
        );
        assert!(!found[0].contains("hunter2"));
    }

    #[test]
    fn the_usual_file_need_not_be_there_and_is_read_if_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gateway.toml");
        let load = || {
            let file = Some(ConfigFile::IfThere(path.clone()));
            Config::load(Sources {
                file,
                ..Sources::default()
            })
        };
        assert_eq!(
            load().unwrap().runs.max_queue,
            Config::default().runs.max_queue
        );
        // What a container engine makes of a file to mount that is not there.
        std::fs::create_dir(&path).unwrap();
        assert!(
            load()
                .unwrap_err()
                .to_string()
                .contains("gateway.toml cannot be read")
        );
        std::fs::remove_dir(&path).unwrap();
        std::fs::write(&path, "[runs]\nmax_queue = 7\n").unwrap();
        assert_eq!(load().unwrap().runs.max_queue, 7);
    }

    #[test]
    fn variables_that_are_not_utf8_are_refused() {
        use std::os::unix::ffi::OsStringExt;
        let value = OsString::from_vec(b"sqlite:\xff".to_vec());
        let env = utf8_variables([
            (OsString::from("THREADKEEPER_STORE__URL"), value.clone()),
            (OsString::from("OTHER"), value),
        ]);
        let found = Config::load(Sources {
            env,
            ..Sources::default()
        })
        .unwrap_err()
        .to_string();
        assert!(
            found.contains("THREADKEEPER_STORE__URL: is not valid UTF-8"),
            "{found}"
        );
    }
}
