//! Checks that types cannot make: references, ranges, and combinations of settings.

use std::time::Duration;

use http::{HeaderName, HeaderValue};
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::checker::Checker;
use super::names::nearest;
use super::tools::{Finding, examine};
use super::{
    AssistantConfig, AuthScheme, Config, KeyConfig, MAX_PAGE, UpstreamConfig, UpstreamKind,
};
use crate::domain::{KeyText, Metadata, UserContent};

/// Longest duration of a setting: ten years. Sums with it stay in the range of every clock.
const LONGEST: Duration = Duration::from_hours(10 * 365 * 24);
/// Smallest buffer of the HTTP library, in bytes.
const SMALLEST_HEAD: usize = 8 * 1024;
/// Paths of endpoints, with which no base URL ends.
const ENDPOINTS: [&str; 4] = [
    "/responses",
    "/conversations",
    "/threads",
    "/chat/completions",
];
/// Headers that the HTTP library or the adapter writes itself.
const OWN_HEADERS: [&str; 12] = [
    "accept",
    "connection",
    "content-length",
    "content-type",
    "expect",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Returns the fields of the run's request that the gateway writes itself, so that `parameters` cannot.
pub const fn reserved_parameters(kind: UpstreamKind) -> &'static [&'static str] {
    match kind {
        UpstreamKind::Assistants => &[
            "additional_messages",
            "assistant_id",
            "instructions",
            "metadata",
            "model",
            "stream",
            "thread",
            "tools",
        ],
        UpstreamKind::Responses => &[
            "background",
            "conversation",
            "input",
            "instructions",
            "metadata",
            "model",
            "previous_response_id",
            "store",
            "stream",
            "stream_options",
            "tools",
        ],
    }
}

/// Makes the checks of every command.
pub(super) fn everything(config: &Config, checker: &mut Checker<'_>) {
    durations(config, checker);
    limits(config, checker);
    origins(config, checker);
    public_url(config, checker);
    store_url(config, checker);
    if let Some(jwt) = &config.auth.jwt {
        jwt.check(checker);
    }
    if config.log.env_filter().is_err() {
        let hint = "write it like \"info\" or \"threadkeeper=debug,info\"";
        checker.report(&["log", "filter"], "is not a log filter", hint);
    }
    for (name, key) in &config.auth.keys {
        self::key(name, key, checker);
    }
    for (name, upstream) in &config.upstreams {
        self::upstream(name, upstream, config.server.max_body_bytes, checker);
    }
    for (name, assistant) in &config.assistants {
        self::assistant(name, assistant, config, checker);
    }
    if !config.assistants.is_empty() && config.default_assistant().is_none() {
        let hint = "name the one \"default\" that answers messages without an assistant";
        checker.report(
            &["assistants", "default"],
            "there are several assistants and none is the default",
            hint,
        );
    }
}

/// Makes the checks of `serve` alone.
pub(super) fn serve(config: &Config, checker: &mut Checker<'_>) {
    if config.store.url.is_none() && !checker.is_broken(&["store", "url_file"]) {
        let hint = "set it in the file, or as THREADKEEPER_STORE__URL or DATABASE_URL";
        checker.report(&["store", "url"], "is missing", hint);
    }
    if config.upstreams.is_empty() {
        let hint =
            "add a table [upstreams.<name>], or try `threadkeeper dev`, which has a simulated one";
        checker.report(
            &["upstreams"],
            "there is no upstream to answer messages",
            hint,
        );
    }
    if config.assistants.is_empty() {
        let hint = "add a table [assistants.default] that names an upstream";
        checker.report(
            &["assistants"],
            "there is no assistant to answer messages",
            hint,
        );
    }
    let is_open = !config.auth.is_configured() && !config.server.allow_unauthenticated;
    if is_open && !config.server.listen.ip().to_canonical().is_loopback() {
        let what = "callers on other machines would need no credentials to read and write all conversations";
        let hint = "add a key to [auth.keys] or set auth.stored_keys = true, listen on 127.0.0.1 or \
                    [::1], or set server.allow_unauthenticated = true";
        checker.report(&["server", "listen"], what, hint);
    }
}

/// Checks that origins are written as browsers send them. Others would never match.
fn origins(config: &Config, checker: &mut Checker<'_>) {
    let path = ["server", "cors_origins"];
    for (what, hint) in config
        .server
        .cors_origins
        .iter()
        .filter_map(|text| origin(text).err())
    {
        checker.report(&path, what, hint);
    }
}

/// Checks that the public URL has no parts that the gateway would ignore.
fn public_url(config: &Config, checker: &mut Checker<'_>) {
    let Some(url) = &config.server.public_url else {
        return;
    };
    let is_plain = matches!(url.scheme(), "http" | "https")
        && url.host_str().is_some()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    if !is_plain {
        let hint = "write it like \"https://chat.example.com/chat-api\": https:// or http://, a host and a path";
        checker.report(
            &["server", "public_url"],
            "is not a plain URL at which callers can reach the gateway",
            hint,
        );
    }
}

/// Checks one origin.
///
/// # Errors
/// The mistake, and a hint.
fn origin(text: &str) -> Result<(), (&'static str, &'static str)> {
    const FORM: &str = "write them like \"https://chat.example.com\": a scheme, a host, the port if it \
                        is not the usual one, and nothing after it";
    let no_origin = Err(("has an entry that is no origin", FORM));
    if text == "null" {
        let what = "has \"null\", which any page can send from a sandboxed frame or a file";
        return Err((what, "give the page an origin of its own"));
    }
    if text.contains('*') {
        let what = "has a `*`, which is no wildcard here and which no browser sends";
        return Err((
            what,
            "write each origin out, those of preview deployments too",
        ));
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return no_origin;
    };
    if matches!(scheme, "http" | "https") {
        let is_sent_so =
            Url::parse(text).is_ok_and(|url| url.origin().ascii_serialization() == *text);
        return if is_sent_so { Ok(()) } else { no_origin };
    }
    if nearest(scheme, &["http", "https"]).is_some() {
        return Err(("has a scheme that is nearly https", FORM));
    }
    if scheme == "file" {
        return Err((
            "has a file, and pages of files have no origin",
            "serve the page over http",
        ));
    }
    // Pages inside an app, such as capacitor://localhost or chrome-extension://<id>. No standard says how
    // browsers write these.
    let is_scheme = scheme.starts_with(|first: char| first.is_ascii_lowercase())
        && scheme
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
    let is_host = !rest.is_empty()
        && rest
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b));
    if is_scheme && is_host {
        Ok(())
    } else {
        no_origin
    }
}

/// Shortest key, in characters. Half of such a key still cannot be guessed.
const SHORTEST_KEY: usize = 24;

fn key(name: &str, key: &KeyConfig, checker: &mut Checker<'_>) {
    let path = |field| ["auth", "keys", name, field];
    match (&key.key, &key.sha256) {
        (None, None) if key.key_file.is_none() => {
            let hint = "set `key`, `key_file`, or `sha256` (printf %s \"$KEY\" | sha256sum)";
            checker.report(&["auth", "keys", name], "has no key", hint);
        }
        (Some(_), Some(_)) => {
            checker.report(&path("sha256"), "key is set as well", "keep one of the two");
        }
        (None, Some(_)) if key.hash().is_none() => {
            checker.report(&path("sha256"), "must be 64 hexadecimal digits", "");
        }
        (Some(key), None) => {
            let text = key.expose_secret();
            if text.len() < SHORTEST_KEY {
                let what = format!("must have at least {SHORTEST_KEY} characters");
                checker.report(&path("key"), what, "make one with `openssl rand -hex 32`");
            } else if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
                checker.report(
                    &path("key"),
                    "must be visible ASCII characters: it is sent in a header",
                    "",
                );
            }
        }
        _ => {}
    }
}

fn durations(config: &Config, checker: &mut Checker<'_>) {
    let Config {
        server,
        store,
        runs,
        ..
    } = config;
    for (path, value, may_be_zero) in [
        (
            ["server", "header_read_timeout"],
            server.header_read_timeout,
            false,
        ),
        (
            ["server", "body_read_timeout"],
            server.body_read_timeout,
            false,
        ),
        (["server", "write_timeout"], server.write_timeout, false),
        (
            ["server", "stream_keep_alive"],
            server.stream_keep_alive,
            false,
        ),
        (["server", "shutdown_grace"], server.shutdown_grace, true),
        (["store", "acquire_timeout"], store.acquire_timeout, false),
        (["store", "max_wait"], store.max_wait, false),
        (["store", "startup_timeout"], store.startup_timeout, true),
        (["runs", "timeout"], runs.timeout, false),
        (["runs", "max_timeout"], runs.max_timeout, false),
        (
            ["runs", "tool_outputs_timeout"],
            runs.tool_outputs_timeout,
            false,
        ),
        (["runs", "settle_timeout"], runs.settle_timeout, false),
        (["runs", "idempotency_ttl"], runs.idempotency_ttl, false),
        (["sessions", "ttl"], config.sessions.ttl, false),
        (
            ["replica", "session_ttl"],
            config.replica.session_ttl,
            false,
        ),
    ] {
        duration(&path, value, may_be_zero, checker);
    }
    let max = ["runs", "max_timeout"];
    if runs.timeout > runs.max_timeout && !checker.is_broken(&max) {
        checker.report(
            &["runs", "timeout"],
            "is longer than runs.max_timeout",
            "raise the one or lower the other",
        );
    }
}

fn duration(path: &[&str], value: Duration, may_be_zero: bool, checker: &mut Checker<'_>) {
    if value.is_zero() && !may_be_zero {
        checker.report(path, "must be longer than zero", "");
    }
    if value > LONGEST {
        checker.report(path, "must be at most ten years", "");
    }
}

fn limits(config: &Config, checker: &mut Checker<'_>) {
    let Config {
        server,
        store,
        runs,
        ..
    } = config;
    let store_connections = usize::try_from(store.max_connections).unwrap_or(usize::MAX);
    for (path, value, least, most) in [
        (
            ["server", "max_connections"],
            server.max_connections,
            1,
            1_000_000,
        ),
        (
            ["server", "max_body_bytes"],
            server.max_body_bytes,
            1,
            usize::MAX,
        ),
        (
            ["server", "max_buffered_body_bytes"],
            server.max_buffered_body_bytes,
            server.max_body_bytes,
            usize::MAX,
        ),
        (
            ["server", "max_header_bytes"],
            server.max_header_bytes,
            SMALLEST_HEAD,
            16 * 1024 * 1024,
        ),
        (
            ["server", "max_key_bytes"],
            server.max_key_bytes,
            1,
            KeyText::MAX_BYTES,
        ),
        (
            ["server", "max_content_parts"],
            server.max_content_parts,
            1,
            UserContent::MAX_PARTS,
        ),
        (
            ["server", "max_metadata_pairs"],
            server.max_metadata_pairs,
            0,
            Metadata::MAX_PAIRS,
        ),
        (
            ["server", "max_page_size"],
            server.max_page_size as usize,
            1,
            MAX_PAGE as usize,
        ),
        (["store", "max_connections"], store_connections, 1, 10_000),
        (["runs", "max_queue"], runs.max_queue, 1, usize::MAX),
        (
            ["runs", "max_queue_bytes"],
            runs.max_queue_bytes,
            server.max_body_bytes,
            usize::MAX,
        ),
        (
            ["runs", "max_reply_bytes"],
            runs.max_reply_bytes,
            1,
            usize::MAX,
        ),
    ] {
        if value < least {
            checker.report(&path, format!("must be at least {least}"), "");
        }
        if value > most {
            checker.report(&path, format!("must be at most {most}"), "");
        }
    }
}

fn store_url(config: &Config, checker: &mut Checker<'_>) {
    let store = &config.store;
    let is_postgres = |url: &str| match url.split_once(':') {
        Some(("postgres" | "postgresql", rest)) => {
            rest.starts_with("//") && Url::parse(url).is_ok()
        }
        _ => false,
    };
    let is_sqlite = |url: &str| match url.split_once(':') {
        Some(("sqlite", path)) => !path.trim_start_matches('/').is_empty(),
        _ => false,
    };
    let url = store.url.as_ref().map(ExposeSecret::expose_secret);
    if url.is_some_and(|url| !is_postgres(url) && !is_sqlite(url)) {
        let hint = "write it like postgres://user@host/database or sqlite:data/threadkeeper.db";
        let path = if store.url_file.is_some() {
            ["store", "url_file"]
        } else {
            ["store", "url"]
        };
        checker.report(&path, "is not the URL of a database", hint);
    }
    let Some(direct) = &store.direct_url else {
        return;
    };
    let path = [
        "store",
        if store.direct_url_file.is_some() {
            "direct_url_file"
        } else {
            "direct_url"
        },
    ];
    if url.is_some_and(is_sqlite) {
        checker.report(
            &path,
            "is for Postgres, and store.url names a SQLite file",
            "leave it out",
        );
    } else if !is_postgres(direct.expose_secret()) {
        let hint = "write it like postgres://user@host/database";
        checker.report(&path, "is not the URL of a Postgres database", hint);
    }
}

fn name(section: &str, name: &str, checker: &mut Checker<'_>) {
    let mut bytes = name.bytes();
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_good = name.len() <= 64
        && bytes.next().is_some_and(is_word)
        && bytes.all(|byte| is_word(byte) || byte == b'_' || byte == b'-');
    if !is_good {
        let what = "a name must be 1 to 64 of a-z, 0-9, _ and -, and begin with a letter or digit";
        checker.report(&[section, name], what, "");
    }
}

fn upstream(
    name: &str,
    upstream: &UpstreamConfig,
    max_body_bytes: usize,
    checker: &mut Checker<'_>,
) {
    self::name("upstreams", name, checker);
    let at = |field| ["upstreams", name, field];
    base_url(&at("base_url"), &upstream.base_url, checker);
    if upstream.kind == UpstreamKind::Assistants && !checker.is_broken(&at("kind")) {
        if !upstream.conversations {
            checker.report(
                &at("conversations"),
                "can be false only for kind \"responses\"",
                "leave it out",
            );
        }
        if upstream.background {
            checker.report(
                &at("background"),
                "can be true only for kind \"responses\"",
                "leave it out",
            );
        }
    }
    duration(
        &at("connect_timeout"),
        upstream.connect_timeout,
        false,
        checker,
    );
    duration(&at("call_timeout"), upstream.call_timeout, false, checker);
    duration(
        &at("pool_idle_timeout"),
        upstream.pool_idle_timeout,
        true,
        checker,
    );
    duration(&at("lock_window"), upstream.lock_window, true, checker);
    duration(
        &at("breaker_window"),
        upstream.breaker_window,
        false,
        checker,
    );
    duration(
        &at("breaker_open_duration"),
        upstream.breaker_open_duration,
        false,
        checker,
    );
    if upstream.max_event_bytes == 0 {
        checker.report(&at("max_event_bytes"), "must be at least 1", "");
    }
    if upstream.max_event_bytes <= max_body_bytes
        && !checker.is_broken(&["server", "max_body_bytes"])
    {
        let what = format!(
            "must be more than server.max_body_bytes ({max_body_bytes}), because an upstream repeats the \
             input in its events"
        );
        checker.report(
            &at("max_event_bytes"),
            what,
            "raise it, or lower server.max_body_bytes",
        );
    }
    if let Some(key) = &upstream.api_key {
        let field = if upstream.api_key_file.is_some() {
            "api_key_file"
        } else {
            "api_key"
        };
        if !is_header_value(key) {
            let what = "the key has characters that a header cannot have";
            checker.report(&at(field), what, "remove blanks and line ends around it");
        }
        let text = key.expose_secret();
        if text
            .get(..7)
            .is_some_and(|begin| begin.eq_ignore_ascii_case("bearer "))
        {
            checker.report(
                &at(field),
                "begins with \"Bearer\", which the gateway writes itself",
                "write the key alone",
            );
        }
        if text.len() > 1
            && ['"', '\'']
                .iter()
                .any(|mark| text.starts_with(*mark) && text.ends_with(*mark))
        {
            let hint = "write the key alone: in a file of variables (--env-file), the marks become a part \
                        of it";
            checker.report(&at(field), "has quotation marks around it", hint);
        }
    }
    headers(name, upstream, checker);
}

fn base_url(path: &[&str], url: &Url, checker: &mut Checker<'_>) {
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        checker.report(
            path,
            "must begin with https:// or http:// and name a host",
            "",
        );
    } else if !url.username().is_empty() || url.password().is_some() {
        checker.report(
            path,
            "must not hold credentials",
            "use api_key, api_key_file or headers",
        );
    } else if url.query().is_some() {
        checker.report(
            path,
            "must not have a query",
            "put it into the table `query` of the upstream",
        );
    } else if url.fragment().is_some() {
        checker.report(
            path,
            "must not have a fragment",
            "leave out # and the text after it",
        );
    } else if let Some(endpoint) = ENDPOINTS
        .iter()
        .find(|end| url.path().trim_end_matches('/').ends_with(**end))
    {
        let hint = format!("leave out {endpoint}: the gateway adds the endpoint of each call");
        checker.report(
            path,
            "is the URL of one endpoint, and not the beginning of all",
            &hint,
        );
    }
}

fn headers(name: &str, upstream: &UpstreamConfig, checker: &mut Checker<'_>) {
    let key_header = match upstream.auth {
        AuthScheme::Bearer => "authorization",
        AuthScheme::ApiKey => "api-key",
    };
    for (header, value) in &upstream.headers {
        let path = ["upstreams", name, "headers", header];
        let Ok(parsed) = HeaderName::try_from(header) else {
            checker.report(&path, "is not the name of a header", "");
            continue;
        };
        if OWN_HEADERS.contains(&parsed.as_str()) {
            checker.report(
                &path,
                "is a header that the gateway writes itself",
                "leave it out",
            );
        } else if parsed.as_str() == key_header && upstream.api_key.is_some() {
            checker.report(&path, "already carries api_key", "keep one of the two");
        } else if !is_header_value(value) {
            checker.report(&path, "has characters that a header cannot have", "");
        }
    }
}

fn is_header_value(value: &SecretString) -> bool {
    let value = value.expose_secret();
    value.trim() == value && !value.is_empty() && HeaderValue::from_str(value).is_ok()
}

fn assistant(name: &str, assistant: &AssistantConfig, config: &Config, checker: &mut Checker<'_>) {
    self::name("assistants", name, checker);
    let at = |field| ["assistants", name, field];
    if let Some(timeout) = assistant.timeout {
        duration(&at("timeout"), timeout, false, checker);
        if timeout > config.runs.max_timeout && !checker.is_broken(&["runs", "max_timeout"]) {
            let hint = "raise the one or lower the other";
            checker.report(&at("timeout"), "is longer than runs.max_timeout", hint);
        }
    }
    if assistant.tools.iter().any(|tool| !tool.is_object()) {
        checker.report(
            &at("tools"),
            "each tool must be a table",
            "write it like { type = \"function\", … }",
        );
    }
    let Some(upstream) = config.upstreams.get(&assistant.upstream) else {
        unknown_upstream(&at("upstream"), assistant, config, checker);
        return;
    };
    if checker.is_broken(&["upstreams", &assistant.upstream, "kind"]) {
        return;
    }
    for (index, tool) in assistant.tools.iter().enumerate() {
        let finding = tool
            .as_object()
            .and_then(|tool| examine(upstream.kind, tool));
        if let Some(Finding::Problem(what, form)) = finding {
            checker.report(
                &["assistants", name, "tools", &index.to_string()],
                what,
                &format!("write it like {form}"),
            );
        }
    }
    let is_given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    match upstream.kind {
        UpstreamKind::Assistants if !is_given(&assistant.assistant_id) => {
            let what = "is missing: the upstream is of kind \"assistants\"";
            checker.report(
                &at("assistant_id"),
                what,
                "set the id of the assistant at the server, asst_…",
            );
        }
        UpstreamKind::Responses if assistant.assistant_id.is_some() => {
            let what = "has no meaning: the upstream is of kind \"responses\"";
            checker.report(&at("assistant_id"), what, "leave it out");
        }
        _ => {}
    }
    let lacks_model = upstream.kind == UpstreamKind::Responses || assistant.model.is_some();
    if lacks_model && !is_given(&assistant.model) {
        let what = "is missing: the upstream is of kind \"responses\"";
        let what = if assistant.model.is_some() {
            "is empty"
        } else {
            what
        };
        checker.report(&at("model"), what, "name the model that answers");
    }
    let reserved = reserved_parameters(upstream.kind);
    for parameter in assistant
        .parameters
        .keys()
        .filter(|key| reserved.contains(&key.as_str()))
    {
        let is_setting = matches!(
            parameter.as_str(),
            "assistant_id" | "instructions" | "model" | "tools"
        );
        let hint = if is_setting {
            "set it beside `parameters`"
        } else {
            "leave it out"
        };
        let path = ["assistants", name, "parameters", parameter];
        checker.report(&path, "is written by the gateway", hint);
    }
}

fn unknown_upstream(
    path: &[&str],
    assistant: &AssistantConfig,
    config: &Config,
    checker: &mut Checker<'_>,
) {
    if checker.is_broken(&["upstreams"])
        || (!assistant.upstream.is_empty()
            && checker.is_broken(&["upstreams", &assistant.upstream]))
    {
        return;
    }
    if assistant.upstream.is_empty() {
        checker.report(path, "is missing", "name one of the upstreams");
        return;
    }
    let known: Vec<&str> = config.upstreams.keys().map(String::as_str).collect();
    let hint = match nearest(&assistant.upstream, &known) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None if known.is_empty() => "add a table [upstreams.<name>]".to_owned(),
        None => format!("there are: {}", known.join(", ")),
    };
    checker.report(path, "there is no upstream of this name", &hint);
}

#[cfg(test)]
mod tests {
    use super::super::load::{ConfigFile, Sources};
    use super::*;
    use crate::config::problem::ConfigProblems;

    fn sources(text: &str) -> Sources {
        let file = ConfigFile::Text {
            name: "g.toml".to_owned(),
            text: text.to_owned(),
        };
        Sources {
            file: Some(file),
            ..Sources::default()
        }
    }

    /// Returns the paths with problems, and the whole text.
    fn problems(text: &str) -> (Vec<String>, String) {
        match Config::load(sources(text)) {
            Ok(_) => (Vec::new(), String::new()),
            Err(found) => (
                found.iter().map(|problem| problem.path.clone()).collect(),
                found.to_string(),
            ),
        }
    }

    #[track_caller]
    fn assert_problems(text: &str, expected: &[&str]) {
        let (mut paths, all) = problems(text);
        paths.sort();
        assert_eq!(paths, expected, "{all}");
    }

    fn both(upstream: &str, assistant: &str) -> String {
        format!(
            "[upstreams.u]\nbase_url = \"https://h/v1\"\n{upstream}\n\
             [assistants.a]\nupstream = \"u\"\n{assistant}\n"
        )
    }

    #[test]
    fn sound_settings_have_no_problems() {
        assert_problems(
            &both(
                "kind = \"responses\"\nconversations = false",
                "model = \"m\"",
            ),
            &[],
        );
        assert_problems(
            &both("kind = \"assistants\"", "assistant_id = \"asst_1\""),
            &[],
        );
        let text = "kind = \"responses\"\nbackground = true\nlock_window = \"0s\"\nbreaker_min_requests = 0";
        assert_problems(&both(text, "model = \"m\""), &[]);
        assert_problems(
            "[store]\nurl = \"postgresql:///d?host=/run/postgresql\"",
            &[],
        );
    }

    #[test]
    fn each_kind_of_upstream_wants_its_own_fields() {
        assert_problems(&both("kind = \"responses\"", ""), &["assistants.a.model"]);
        assert_problems(
            &both("kind = \"responses\"", "model = \"\""),
            &["assistants.a.model"],
        );
        let text = both(
            "kind = \"responses\"",
            "model = \"m\"\nassistant_id = \"asst_1\"",
        );
        assert_problems(&text, &["assistants.a.assistant_id"]);
        let text = both(
            "kind = \"assistants\"\nconversations = false\nbackground = true",
            "",
        );
        assert_problems(
            &text,
            &[
                "assistants.a.assistant_id",
                "upstreams.u.background",
                "upstreams.u.conversations",
            ],
        );
    }

    #[test]
    fn keys_are_long_and_one_of_a_kind() {
        let hash = "0".repeat(64);
        let keys = |text: &str| format!("[auth.keys.k]\nscope = \"chat\"\n{text}");
        assert_problems(&keys("key = \"0123456789abcdef01234567\""), &[]);
        assert_problems(&keys(&format!("sha256 = \"{hash}\"")), &[]);
        assert_problems(&keys(""), &["auth.keys.k"]);
        assert_problems(&keys("key = \"too short\""), &["auth.keys.k.key"]);
        assert_problems(
            &keys("key = \"0123456789abcdef 01234567\""),
            &["auth.keys.k.key"],
        );
        assert_problems(&keys("sha256 = \"0\""), &["auth.keys.k.sha256"]);
        assert_problems(
            &keys(&format!("sha256 = \"{}g\"", &hash[1..])),
            &["auth.keys.k.sha256"],
        );
        let two = format!("key = \"0123456789abcdef01234567\"\nsha256 = \"{hash}\"");
        assert_problems(&keys(&two), &["auth.keys.k.sha256"]);
        assert_problems(
            "[auth.keys.k]\nkey = \"0123456789abcdef01234567\"",
            &["auth.keys.k.scope"],
        );
        assert_problems(
            &keys("tenant = \"\"\nkey = \"0123456789abcdef01234567\""),
            &["auth.keys.k.tenant"],
        );
        let open = "[server]\nlisten = \"0.0.0.0:80\"\n";
        for (more, fits) in [
            ("", false),
            ("[auth]\nstored_keys = true", true),
            (&keys(&format!("sha256 = \"{hash}\"")), true),
        ] {
            let found = Config::load_for_serve(sources(&format!("{open}{more}"))).unwrap_err();
            let complains = found.iter().any(|problem| problem.path == "server.listen");
            assert_eq!(complains, !fits, "{more}: {found}");
        }
    }

    #[test]
    fn origins_are_written_as_browsers_send_them() {
        let origins = |origin: &str| {
            format!("[server]\ncors_origins = [\"https://a.example\", \"{origin}\"]")
        };
        for good in [
            "https://b.example",
            "http://localhost:3000",
            "https://b.example:8443",
            "capacitor://localhost",
            "ionic://localhost",
            "tauri://localhost",
            "app://-",
            "chrome-extension://mkfbnkjogbpamjjdhmlgplbmiddgcnii",
            "moz-extension://4a4c7b9e-2ef1-4a0d-8f6a-0d0f6f2a3b11",
            "safari-web-extension://E5CE4C2B-4C31-4C9A-9B0E-2B1D6C4A7F10",
        ] {
            assert_problems(&origins(good), &[]);
        }
        for (bad, what) in [
            ("*", "a `*`"),
            ("https://*.b.example", "a `*`"),
            ("b.example", "no origin"),
            ("https://b.example/", "no origin"),
            ("https://B.example", "no origin"),
            ("https://b.example:443", "no origin"),
            ("null", "sandboxed"),
            ("file://", "no origin"),
            ("htps://b.example", "nearly https"),
            ("capacitor://", "no origin"),
            ("capacitor://localhost/", "no origin"),
            ("Capacitor://localhost", "no origin"),
        ] {
            assert_problems(&origins(bad), &["server.cors_origins"]);
            assert!(
                problems(&origins(bad)).1.contains(what),
                "{bad}: {}",
                problems(&origins(bad)).1
            );
        }
    }

    #[test]
    fn a_rate_says_how_many_and_in_which_time() {
        assert_problems(
            "[limits]\nuser_messages = \"10/m\"\ntenant_requests = \"200/s burst 2000\"",
            &[],
        );
        let form = "write it like \"10/m\" or \"20/s burst 100\"; write less than one a second as a number \
                    a minute";
        for (written, told) in [
            ("10", "expected a rate, found a number"),
            ("0.5", "expected a rate, found a number"),
            ("\"10\"", "expected a rate"),
            (
                "\"0/m\"",
                "a rate of 0 lets nothing through: leave the setting out to limit nothing",
            ),
            ("\"0.5/s\"", "a rate must begin with a whole number"),
            (
                "\"10/fortnight\"",
                "the unit of a rate must be s, m, h or d",
            ),
            (
                "\"10/m burst 0\"",
                "the burst of a rate must be a whole number, 1 or more",
            ),
        ] {
            let (_, all) = problems(&format!("[limits]\nuser_messages = {written}"));
            let line = format!("limits.user_messages (g.toml, line 2): {told}; {form}");
            assert!(all.contains(&line), "{written}: {all}");
        }
        let (_, all) = problems("[limits]\nuser_rate = 10");
        assert!(all.contains("there is no such setting"), "{all}");
    }

    #[test]
    fn no_complaint_follows_from_a_complaint() {
        assert_problems(&both("kind = \"other\"", ""), &["upstreams.u.kind"]);
        assert_problems(
            &both("kind = \"other\"\nconversations = false", ""),
            &["upstreams.u.kind"],
        );
        assert_problems(
            "[runs]\ntimeout = \"1h\"\nmax_timeout = \"long\"",
            &["runs.max_timeout"],
        );
        assert_problems(
            "upstreams = 1\n[assistants.a]\nupstream = \"u\"",
            &["upstreams"],
        );
    }

    #[test]
    fn an_assistant_names_an_upstream_that_exists() {
        let text = "[upstreams.openai]\nkind = \"responses\"\nbase_url = \"https://h\"\n\
                    [assistants.a]\nupstream = \"openia\"\nmodel = \"m\"";
        assert_problems(text, &["assistants.a.upstream"]);
        assert!(problems(text).1.contains("did you mean \"openai\"?"));
        assert_problems("[assistants.a]\nmodel = \"m\"", &["assistants.a.upstream"]);
    }

    #[test]
    fn one_of_several_assistants_is_the_default() {
        let one = both("kind = \"responses\"", "model = \"m\"");
        let two = format!("{one}[assistants.b]\nupstream = \"u\"\nmodel = \"m\"\n");
        let three = format!("{two}[assistants.default]\nupstream = \"u\"\nmodel = \"m\"\n");
        assert_eq!(
            Config::load(sources(&one)).unwrap().default_assistant(),
            Some("a")
        );
        assert_problems(&two, &["assistants.default"]);
        assert_eq!(
            Config::load(sources(&three)).unwrap().default_assistant(),
            Some("default")
        );
        assert_eq!(Config::default().default_assistant(), None);
    }

    #[test]
    fn the_gateway_s_own_parameters_cannot_be_set() {
        let text = both(
            "kind = \"responses\"",
            "model = \"m\"\nparameters = { temperature = 1, stream = false, tools = [] }",
        );
        assert_problems(
            &text,
            &[
                "assistants.a.parameters.stream",
                "assistants.a.parameters.tools",
            ],
        );
        let text = both(
            "kind = \"assistants\"",
            "assistant_id = \"asst_1\"\nparameters = { thread = {}, store = true }",
        );
        assert_problems(&text, &["assistants.a.parameters.thread"]);
    }

    #[test]
    fn base_urls_are_plain() {
        for url in [
            "ftp://h/v1",
            "https://u:p@h/v1",
            "https://h/v1?a=b",
            "https://h/v1#f",
            "data:text",
            "unix:/run/s",
            "https://h/v1/responses",
            "https://h/v1/conversations/",
            "https://h/v1/threads",
            "https://h/v1/chat/completions",
        ] {
            let text = format!("[upstreams.u]\nkind = \"responses\"\nbase_url = \"{url}\"");
            assert_problems(&text, &["upstreams.u.base_url"]);
        }
    }

    #[test]
    fn an_event_has_room_for_what_a_body_may_hold() {
        let with = |body: usize| {
            let upstream = "kind = \"responses\"\nmax_event_bytes = 1048576";
            format!(
                "[server]\nmax_body_bytes = {body}\n{}",
                both(upstream, "model = \"m\"")
            )
        };
        assert_problems(&with(1_048_576), &["upstreams.u.max_event_bytes"]);
        assert_problems(&with(1_048_575), &[]);
    }

    #[test]
    fn what_is_together_has_room_for_one_body() {
        assert_problems(
            "[server]\nmax_body_bytes = 1000\nmax_buffered_body_bytes = 999\n[runs]\nmax_queue_bytes = 999",
            &["runs.max_queue_bytes", "server.max_buffered_body_bytes"],
        );
    }

    #[test]
    fn proxies_are_networks_and_the_public_url_is_plain() {
        for list in [
            "\"10.0.0.0/33\"",
            "\"proxy.example.com\"",
            "\"\"",
            "\"10.0.0.1:80\"",
        ] {
            assert_problems(
                &format!("[server]\ntrusted_proxies = [{list}]"),
                &["server.trusted_proxies.0"],
            );
        }
        assert_problems(
            "[server]\ntrusted_proxies = [\"10.0.0.0/8\", \"192.0.2.1\", \"::1\", \"fd00::/8\"]",
            &[],
        );
        for url in [
            "ftp://h/a",
            "https://u:p@h/a",
            "https://h/a?b",
            "https://h/a#b",
            "data:text",
        ] {
            assert_problems(
                &format!("[server]\npublic_url = \"{url}\""),
                &["server.public_url"],
            );
        }
        assert_problems(
            "[server]\npublic_url = \"https://chat.example.com/chat-api\"",
            &[],
        );
    }

    #[test]
    fn an_upstream_s_key_is_the_key_alone() {
        for (key, fits) in [
            ("sk-1", true),
            ("Bearer sk-1", false),
            ("bearer sk-1", false),
            ("'sk-1'", false),
        ] {
            let text = both(
                &format!("kind = \"responses\"\napi_key = \"{key}\""),
                "model = \"m\"",
            );
            assert_problems(&text, if fits { &[] } else { &["upstreams.u.api_key"] });
        }
    }

    #[test]
    fn tools_have_the_form_that_their_upstream_reads() {
        const FLAT: &str = "{ type = \"function\", name = \"f\", parameters = {} }";
        const NESTED: &str = "{ type = \"function\", function = { name = \"f\" } }";
        let responses = |tool: &str| {
            both(
                "kind = \"responses\"",
                &format!("model = \"m\"\ntools = [{tool}]"),
            )
        };
        let assistants = |tool: &str| {
            both(
                "kind = \"assistants\"",
                &format!("assistant_id = \"asst_1\"\ntools = [{tool}]"),
            )
        };
        assert_problems(&responses(FLAT), &[]);
        assert_problems(&assistants(NESTED), &[]);
        assert_problems(
            &responses(&format!("{FLAT}, {NESTED}")),
            &["assistants.a.tools.1"],
        );
        assert!(
            problems(&responses(NESTED))
                .1
                .contains("form of Chat Completions")
        );
        assert_problems(
            &assistants(&format!("{FLAT}, {NESTED}")),
            &["assistants.a.tools.0"],
        );
        assert!(problems(&assistants(FLAT)).1.contains("form of Responses"));
        for tool in [
            "{}",
            "{ type = 1 }",
            "{ type = \"function\" }",
            "{ type = \"custom\" }",
        ] {
            assert_problems(&responses(tool), &["assistants.a.tools.0"]);
        }
        assert_problems(
            &assistants("{ type = \"function\", function = {} }"),
            &["assistants.a.tools.0"],
        );
        assert_problems(&responses("{ type = \"nonsense\" }"), &[]);
    }

    #[test]
    fn headers_are_headers_and_not_ours() {
        let text = both(
            "kind = \"responses\"\napi_key = \"k\"\n\
             headers = { \"a b\" = \"x\", Host = \"x\", good = \"a\\nb\", Authorization = \"x\", fine = \"x\" }",
            "model = \"m\"",
        );
        let at = |header: &str| format!("upstreams.u.headers.{header}");
        assert_problems(
            &text,
            &[&at("Authorization"), &at("Host"), &at("a b"), &at("good")],
        );
    }

    #[test]
    fn ranges_are_checked() {
        assert_problems(
            "[server]\nmax_connections = 0\nmax_header_bytes = 8191\nstream_keep_alive = \"0s\"\nshutdown_grace = \"0s\"\n\
             [runs]\nmax_queue = 0\ntimeout = \"31m\"\n[sessions]\nttl = \"11y\"\n[log]\nfilter = \"a=loud\"\n\
             [store]\nmax_connections = 0",
            &[
                "log.filter",
                "runs.max_queue",
                "runs.timeout",
                "server.max_connections",
                "server.max_header_bytes",
                "server.stream_keep_alive",
                "sessions.ttl",
                "store.max_connections",
            ],
        );
        let text = both(
            "kind = \"responses\"\nlock_window = \"11y\"\nbreaker_open_duration = \"0s\"\nbreaker_window = \"0s\"",
            "model = \"m\"\ntimeout = \"31m\"",
        );
        assert_problems(
            &text,
            &[
                "assistants.a.timeout",
                "upstreams.u.breaker_open_duration",
                "upstreams.u.breaker_window",
                "upstreams.u.lock_window",
            ],
        );
    }

    #[test]
    fn names_are_words() {
        let text = "[upstreams.Open]\nkind = \"responses\"\nbase_url = \"https://h\"\n\
                    [upstreams.\"\"]\nkind = \"responses\"\nbase_url = \"https://h\"\n\
                    [upstreams.-a]\nkind = \"responses\"\nbase_url = \"https://h\"\n\
                    [upstreams.1_a-b]\nkind = \"responses\"\nbase_url = \"https://h\"";
        assert_problems(text, &["upstreams.", "upstreams.-a", "upstreams.Open"]);
    }

    #[test]
    fn serve_wants_a_store_an_upstream_an_assistant_and_loopback() {
        let paths = |found: Result<(), ConfigProblems>| -> Vec<String> {
            found
                .err()
                .iter()
                .flatten()
                .map(|problem| problem.path.clone())
                .collect()
        };
        let mut config = Config::default();
        assert_eq!(
            paths(config.check_serve()),
            ["store.url", "upstreams", "assistants"]
        );
        let text = both("kind = \"responses\"", "model = \"m\"") + "[store]\nurl = \"sqlite:a.db\"";
        config = Config::load_for_serve(sources(&text)).unwrap();
        for (listen, open) in [
            ("0.0.0.0:1", true),
            ("[::]:1", true),
            ("10.0.0.1:1", true),
            ("127.0.0.2:1", false),
        ] {
            config.server.listen = listen.parse().unwrap();
            config.server.allow_unauthenticated = false;
            assert_eq!(!paths(config.check_serve()).is_empty(), open, "{listen}");
            config.server.allow_unauthenticated = true;
            assert_eq!(config.check_serve(), Ok(()));
        }
    }

    #[test]
    fn serve_and_the_rest_are_one_list() {
        let found = Config::load_for_serve(sources("[runs]\nmax_queue = 0")).unwrap_err();
        let paths: Vec<&str> = found.iter().map(|problem| problem.path.as_str()).collect();
        assert_eq!(
            paths,
            ["runs.max_queue", "store.url", "upstreams", "assistants"]
        );
    }
}
