//! Headers that proxies add to a request: the client's address, and the path prefix of the gateway.
//! Anybody can send these headers, so the gateway believes only the proxies of `server.trusted_proxies`.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName};

use crate::config::ServerConfig;

/// Header with a list of addresses. Each proxy appends the address of its own peer.
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Header with the path prefix that a proxy removed.
const FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");
/// Length of a prefix, in bytes.
const MAX_PREFIX: usize = 256;

/// Returns the client's address: the peer, or, behind trusted proxies, the last address in
/// `X-Forwarded-For` that is not a trusted proxy. If a trusted proxy wrote something that is not an
/// address, returns that proxy, because a client may have invented everything before it.
pub(super) fn client(peer: IpAddr, headers: &HeaderMap, server: &ServerConfig) -> IpAddr {
    let mut client = peer.to_canonical();
    let mut told = headers
        .get_all(FORWARDED_FOR)
        .iter()
        .rev()
        .flat_map(|value| {
            let text = value.to_str().unwrap_or_default();
            text.rsplit(',').map(str::trim)
        });
    while server.trusts(client) {
        let Some(before) = told.next().and_then(address) else {
            break;
        };
        client = before;
    }
    client
}

/// Reads an address with or without a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`,
/// `[2001:db8::1]:80`.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .unwrap_or(text);
    let address = bare
        .parse()
        .ok()
        .or_else(|| text.parse().ok().map(|address: SocketAddr| address.ip()));
    address.map(|address| address.to_canonical())
}

/// The prefix of the gateway's paths, as callers see them: empty, or a path such as `/chat-api` without
/// a slash at its end.
#[derive(Clone, Debug, Default)]
pub(super) struct Prefix(pub(super) String);

impl Prefix {
    /// Returns the prefix that a trusted proxy sent, or else the path of `server.public_url`.
    pub(super) fn of(peer: IpAddr, headers: &HeaderMap, server: &ServerConfig) -> Self {
        let mut told = headers.get_all(FORWARDED_PREFIX).iter();
        match (told.next(), told.next()) {
            (Some(prefix), None) if server.trusts(peer.to_canonical()) => prefix
                .to_str()
                .ok()
                .and_then(path)
                .unwrap_or_else(|| Self::set(server)),
            _ => Self::set(server),
        }
    }

    fn set(server: &ServerConfig) -> Self {
        server
            .public_url
            .as_ref()
            .and_then(|url| path(url.path()))
            .unwrap_or_default()
    }
}

/// Checks a prefix. It must not contain `//`, which would lead to another host.
fn path(text: &str) -> Option<Prefix> {
    let text = text.trim_end_matches('/');
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~%!$&'()*+;=:@".contains(&byte);
    let is_path = text.is_empty() || text.starts_with('/');
    let is_good = is_path
        && text.len() <= MAX_PREFIX
        && text.bytes().all(is_plain)
        && !text
            .split('/')
            .skip(1)
            .any(|part| ["", ".", ".."].contains(&part));
    is_good.then(|| Prefix(text.to_owned()))
}

impl<S: Send + Sync> FromRequestParts<S> for Prefix {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get::<Self>().cloned().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn server() -> ServerConfig {
        let networks = ["10.0.0.0/8", "::1", "2001:db8:1::/48"];
        let trusted_proxies = networks
            .iter()
            .map(|text| (*text).to_owned().try_into().unwrap())
            .collect();
        let public_url = Some("https://chat.example.com/set/".parse().unwrap());
        ServerConfig {
            public_url,
            trusted_proxies,
            ..ServerConfig::default()
        }
    }

    fn headers(name: &HeaderName, values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn the_client_is_the_last_address_that_is_no_trusted_proxy() {
        for (peer, told, client) in [
            // A peer that is not a trusted proxy.
            ("192.0.2.9", &["198.51.100.7"][..], "192.0.2.9"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.7"], "198.51.100.7"),
            ("::ffff:10.0.0.1", &["::ffff:198.51.100.7"], "198.51.100.7"),
            // A caller sent the header itself, and the proxy appended to it.
            ("10.0.0.1", &["1.2.3.4, 198.51.100.7"], "198.51.100.7"),
            (
                "10.0.0.1",
                &["10.9.9.9, 198.51.100.7,10.0.0.2"],
                "198.51.100.7",
            ),
            ("10.0.0.1", &["1.2.3.4", "198.51.100.7"], "198.51.100.7"),
            ("::1", &["2001:db8:2::7"], "2001:db8:2::7"),
            (
                "::1",
                &["1.2.3.4, [2001:db8:2::7]:443, [2001:db8:1::1]"],
                "2001:db8:2::7",
            ),
            ("10.0.0.1", &["198.51.100.7:5000"], "198.51.100.7"),
            ("10.0.0.1", &["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            ("10.0.0.1", &["1.2.3.4, unknown"], "10.0.0.1"),
            ("10.0.0.1", &["1.2.3.4, unknown, 10.0.0.2"], "10.0.0.2"),
            ("10.0.0.1", &[""], "10.0.0.1"),
            ("10.0.0.1", &["1.2.3.4,"], "10.0.0.1"),
        ] {
            let headers = headers(&FORWARDED_FOR, told);
            let found = super::client(peer.parse().unwrap(), &headers, &server());
            assert_eq!(found.to_string(), client, "{peer} {told:?}");
        }
    }

    #[test]
    fn a_prefix_is_that_of_a_trusted_proxy_or_the_set_one() {
        let deep = format!("/{}", "a".repeat(MAX_PREFIX));
        for (peer, told, prefix) in [
            ("10.0.0.1", &[][..], "/set"),
            ("10.0.0.1", &["/chat-api"], "/chat-api"),
            ("10.0.0.1", &["/chat-api/"], "/chat-api"),
            ("10.0.0.1", &["/a/b%20c"], "/a/b%20c"),
            ("10.0.0.1", &["/"], ""),
            ("192.0.2.9", &["/chat-api"], "/set"),
            ("10.0.0.1", &["/a", "/b"], "/set"),
            ("10.0.0.1", &["//evil.example"], "/set"),
            ("10.0.0.1", &["https://evil.example"], "/set"),
            ("10.0.0.1", &["/a/../b"], "/set"),
            ("10.0.0.1", &["/a?b"], "/set"),
            ("10.0.0.1", &["/a, /b"], "/set"),
            ("10.0.0.1", &["/\\evil.example"], "/set"),
            ("10.0.0.1", &[deep.as_str()], "/set"),
        ] {
            let headers = headers(&FORWARDED_PREFIX, told);
            let found = Prefix::of(peer.parse().unwrap(), &headers, &server());
            assert_eq!(found.0, prefix, "{peer} {told:?}");
        }
    }

    proptest! {
        #[test]
        fn no_header_is_too_odd(bytes in prop::collection::vec(any::<u8>(), 0..80), peer in any::<IpAddr>()) {
            let Ok(value) = HeaderValue::from_bytes(&bytes) else { return Ok(()) };
            let headers = HeaderMap::from_iter([(FORWARDED_FOR, value.clone()), (FORWARDED_PREFIX, value)]);
            let untrusting = ServerConfig::default();
            prop_assert_eq!(super::client(peer, &headers, &untrusting), peer.to_canonical());
            prop_assert_eq!(Prefix::of(peer, &headers, &untrusting).0, "");
            let peer = IpAddr::from([10, 0, 0, 1]);
            super::client(peer, &headers, &server());
            let prefix = Prefix::of(peer, &headers, &server()).0;
            prop_assert!(prefix.is_empty() || (prefix.starts_with('/') && !prefix.contains("//")));
        }
    }
}
