//! Doubts: settings that are valid but probably a mistake. They are warnings and never refusals.

use std::net::IpAddr;

use url::{Host, Url};

use super::problem::Problem;
use super::tools::{Finding, examine};
use super::{Config, UpstreamConfig};

impl Config {
    /// Returns what is probably a mistake in a valid configuration. The texts repeat no values.
    pub fn doubts(&self) -> Vec<Problem> {
        let upstreams = self.upstreams.iter().flat_map(|(name, upstream)| {
            let doubt = |field: &str, what: &str| doubt(format!("upstreams.{name}.{field}"), what.to_owned());
            let without_key = lacks_key(upstream).then(|| {
                doubt(
                    "api_key",
                    "is missing, and neither `headers` nor `query` has a key, so the gateway sends none: \
                     set it \
                     unless the upstream needs none",
                )
            });
            let without_version = lacks_version(&upstream.base_url)
                .then(|| doubt("base_url", "has no path, and this server answers below /v1: add /v1"));
            [without_key, without_version].into_iter().flatten()
        });
        let tools = self.assistants.iter().flat_map(|(name, assistant)| {
            let kind = self
                .upstreams
                .get(&assistant.upstream)
                .map(|upstream| upstream.kind);
            assistant
                .tools
                .iter()
                .enumerate()
                .filter_map(
                    move |(index, tool)| match examine(kind?, tool.as_object()?)? {
                        Finding::Doubt(what) => {
                            Some(doubt(format!("assistants.{name}.tools.{index}"), what))
                        }
                        Finding::Problem(..) => None,
                    },
                )
        });
        upstreams.chain(tools).collect()
    }
}

fn doubt(path: String, what: String) -> Problem {
    Problem {
        path,
        origin: None,
        what,
        hint: None,
    }
}

fn lacks_key(upstream: &UpstreamConfig) -> bool {
    let sends_none =
        upstream.api_key.is_none() && upstream.headers.is_empty() && upstream.query.is_empty();
    sends_none && upstream.base_url.scheme() == "https" && is_public(&upstream.base_url)
}

fn lacks_version(url: &Url) -> bool {
    url.host_str() == Some("api.openai.com") && url.path() == "/"
}

/// Returns whether a URL's host is on the internet, by its name or address.
fn is_public(url: &Url) -> bool {
    /// Last parts of names inside a network.
    const INNER: [&str; 12] = [
        "local",
        "localhost",
        "internal",
        "intranet",
        "private",
        "lan",
        "home",
        "corp",
        "svc",
        "arpa",
        "test",
        "invalid",
    ];
    let ip = match url.host() {
        Some(Host::Domain(name)) => {
            let name = name.trim_end_matches('.');
            return name
                .rsplit_once('.')
                .is_some_and(|(_, last)| !INNER.contains(&last));
        }
        Some(Host::Ipv4(ip)) => IpAddr::V4(ip),
        Some(Host::Ipv6(ip)) => IpAddr::V6(ip).to_canonical(),
        None => return false,
    };
    match ip {
        IpAddr::V4(ip) => !(ip.is_private() || ip.is_loopback() || ip.is_link_local()),
        IpAddr::V6(ip) => !(ip.is_unique_local() || ip.is_loopback() || ip.is_unicast_link_local()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::load::{ConfigFile, Sources};
    use super::*;

    /// Returns the doubts about a valid configuration.
    fn doubts(upstream: &str, assistant: &str) -> Vec<String> {
        let text = format!(
            "[upstreams.u]\n{upstream}\n[assistants.default]\nupstream = \"u\"\nmodel = \"m\"\n{assistant}\n"
        );
        let file = Some(ConfigFile::Text {
            name: "g.toml".to_owned(),
            text,
        });
        let config = Config::load(Sources {
            file,
            ..Sources::default()
        })
        .unwrap();
        config.doubts().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_public_server_without_a_key_is_doubtful() {
        let at = |url: &str, more: &str| {
            doubts(
                &format!("kind = \"responses\"\nbase_url = \"{url}\"\n{more}"),
                "",
            )
            .join("\n")
        };
        for url in [
            "https://api.openai.com/v1",
            "https://llm.example.com/v1",
            "https://8.8.8.8/v1",
        ] {
            assert!(
                at(url, "").starts_with("upstreams.u.api_key: is missing"),
                "{url}"
            );
        }
        for url in [
            "http://api.example.com/v1",
            "https://vllm:8000/v1",
            "https://vllm.default.svc.cluster.local/v1",
            "https://10.1.2.3/v1",
            "https://[fd00::1]/v1",
        ] {
            assert_eq!(at(url, ""), "", "{url}");
        }
        for key in [
            "api_key = \"k\"",
            "headers = { x-key = \"k\" }",
            "query = { key = \"k\" }",
        ] {
            assert_eq!(at("https://llm.example.com/v1", key), "", "{key}");
        }
        assert!(at("https://api.openai.com", "api_key = \"k\"").contains("below /v1"));
    }

    #[test]
    fn tools_of_unknown_types_are_doubtful_and_known_ones_want_their_fields() {
        let of = |kind: &str, tool: &str| {
            let more = if kind == "assistants" {
                "assistant_id = \"asst_1\"\n"
            } else {
                ""
            };
            let upstream = format!("kind = \"{kind}\"\nbase_url = \"http://h/v1\"");
            doubts(
                &upstream,
                &format!("{more}tools = [{{ type = \"web_search\" }}, {tool}]"),
            )
            .join("\n")
        };
        let found = of("responses", "{ type = \"websearch\" }");
        assert!(
            found.starts_with("assistants.default.tools.1: has a `type`"),
            "{found}"
        );
        assert!(found.ends_with("did you mean \"web_search\"?"), "{found}");
        assert!(of("responses", "{ type = \"file_search\" }").contains("`vector_store_ids`"));
        assert_eq!(
            of(
                "responses",
                "{ type = \"file_search\", vector_store_ids = [] }"
            ),
            ""
        );
        let mcp = "type = \"mcp\", server_label = \"s\", require_approval = \"always\"";
        assert!(of("responses", &format!("{{ {mcp} }}")).contains("`connector_id`"));
        assert_eq!(
            of(
                "responses",
                &format!("{{ {mcp}, server_url = \"https://s\" }}")
            ),
            ""
        );
        assert!(of("assistants", "{ type = \"file_search\" }").contains("tools.0: has a `type`"));
        assert!(!of("assistants", "{ type = \"file_search\" }").contains("tools.1"));
    }
}
