//! How callers prove who they are.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use url::{Host, Url};

use super::checker::Checker;
use super::upstreams::optional_url;
use crate::domain::{Access, TenantKey};

/// Clocks that are further apart than this want mending, not patience.
const MAX_LEEWAY: Duration = Duration::from_mins(5);
/// The output of HMAC-SHA256: a shorter secret is easier to guess than that.
const MIN_SECRET_BYTES: usize = 32;
/// So often may the issuer be asked anyway, for a key that is not known.
const MIN_REFRESH: Duration = Duration::from_secs(30);
/// So long keys are kept that cannot be fetched again.
const MAX_REFRESH: Duration = Duration::from_hours(24);

/// What callers can prove themselves with. Without any of it nobody has to prove anything.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    /// The keys that `threadkeeper keys create` has made open, too.
    pub stored_keys: bool,
    /// Keys of the configuration, by names of its own.
    pub keys: BTreeMap<String, KeyConfig>,
    /// Tokens of an issuer; none are taken if left out.
    pub jwt: Option<JwtConfig>,
}

/// A key of the configuration: itself, or its SHA-256.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    #[serde(default)]
    pub key: Option<SecretString>,
    /// A file that holds it. Read by [`Config::load`](super::Config::load), which puts the key where it belongs.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// 64 hexadecimal digits.
    #[serde(default)]
    pub sha256: Option<String>,
    /// Whose conversations it opens.
    #[serde(default)]
    pub tenant: TenantKey,
    pub scope: Access,
}

/// JSON web tokens of one issuer. Exactly one of `secret`, `public_key` and `jwks_url` is the source of keys.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JwtConfig {
    /// Exactly what the claim `iss` says.
    pub issuer: String,
    /// One of these is in the claim `aud`. Not empty.
    pub audience: Vec<String>,
    /// How tokens may be signed. Not empty; HS256 only alone.
    pub algorithms: Vec<JwtAlgorithm>,
    /// For HS256: the bytes of this text, at least 32.
    pub secret: Option<SecretString>,
    /// A file that holds the secret. Read by [`Config::load`](super::Config::load), which puts it where it belongs.
    pub secret_file: Option<PathBuf>,
    /// A file that holds the issuer's public key in PEM form. Read by [`Config::load`](super::Config::load).
    pub public_key_file: Option<PathBuf>,
    /// What that file holds. Not a setting. Not shown, in case it is a key of another kind.
    #[serde(skip)]
    pub public_key: Option<SecretString>,
    /// Where the issuer's key set is fetched: https, or http on this machine.
    #[serde(deserialize_with = "optional_url")]
    pub jwks_url: Option<Url>,
    /// The age at which the key set is fetched again, 30 s to 24 h.
    #[serde(with = "humantime_serde")]
    pub jwks_refresh: Duration,
    /// How far the issuer's clock may be off, at most 5 minutes.
    #[serde(with = "humantime_serde")]
    pub leeway: Duration,
    /// The claim that names the tenant, dots between levels. Without it all tokens are of the tenant `default`.
    pub tenant_claim: Option<String>,
    /// The claim that makes an admin, dots between levels.
    pub admin_claim: Option<String>,
    /// What it says then, alone or in a list; `true` if left out.
    pub admin_value: Option<String>,
}

/// How a token may be signed.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
pub enum JwtAlgorithm {
    /// HMAC with SHA-256, a shared secret.
    #[serde(rename = "HS256")]
    Hs256,
    /// RSA (PKCS #1 v1.5) with SHA-256, at least 2048 bits.
    #[serde(rename = "RS256")]
    Rs256,
    /// ECDSA on P-256 with SHA-256.
    #[serde(rename = "ES256")]
    Es256,
    /// Ed25519.
    #[serde(rename = "EdDSA")]
    EdDsa,
}

impl AuthConfig {
    /// Somebody has to prove something.
    pub fn is_configured(&self) -> bool {
        self.stored_keys || !self.keys.is_empty() || self.jwt.is_some()
    }
}

impl KeyConfig {
    /// The hash that is written; `None` if there is none that could be one.
    pub fn hash(&self) -> Option<[u8; 32]> {
        let digits = self.sha256.as_ref()?.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let text = std::str::from_utf8(pair)
                .ok()
                .filter(|it| it.bytes().all(|b| b.is_ascii_hexdigit()))?;
            *byte = u8::from_str_radix(text, 16).ok()?;
        }
        Some(hash)
    }
}

impl Default for JwtConfig {
    /// What a table without fields says: not usable as it is.
    fn default() -> Self {
        Self {
            issuer: String::new(),
            audience: Vec::new(),
            algorithms: Vec::new(),
            secret: None,
            secret_file: None,
            public_key_file: None,
            public_key: None,
            jwks_url: None,
            jwks_refresh: Duration::from_mins(10),
            leeway: Duration::from_secs(30),
            tenant_claim: None,
            admin_claim: None,
            admin_value: None,
        }
    }
}

impl JwtConfig {
    pub(super) fn check(&self, checker: &mut Checker<'_>) {
        if self.issuer.is_empty() {
            let hint = "write exactly what the tokens say in `iss`";
            checker.report(&at("issuer"), "is missing", hint);
        }
        if checker.is_broken_inside(&at("audience")) {
            // Said already.
        } else if self.audience.is_empty() {
            checker.report(
                &at("audience"),
                "is missing",
                "name what the tokens say in `aud`",
            );
        } else if self.audience.iter().any(String::is_empty) {
            checker.report(&at("audience"), "has an empty entry", "leave it out");
        }
        self.check_algorithms(checker);
        self.check_keys(checker);
        if self.leeway > MAX_LEEWAY {
            checker.report(&at("leeway"), "must be at most 5 minutes", "");
        }
        if self.jwks_refresh < MIN_REFRESH || self.jwks_refresh > MAX_REFRESH {
            checker.report(
                &at("jwks_refresh"),
                "must be from 30 seconds to 24 hours",
                "",
            );
        }
        for (field, claim) in [
            ("tenant_claim", &self.tenant_claim),
            ("admin_claim", &self.admin_claim),
        ] {
            if claim.as_ref().is_some_and(String::is_empty) {
                checker.report(&at(field), "is empty", "name a claim, or leave it out");
            }
        }
        if self.admin_value.is_some() && self.admin_claim.is_none() {
            let hint = "name the claim that has this value, or leave it out";
            checker.report(
                &at("admin_value"),
                "has no meaning without admin_claim",
                hint,
            );
        }
    }

    fn check_algorithms(&self, checker: &mut Checker<'_>) {
        let path = at("algorithms");
        if checker.is_broken_inside(&path) {
            return;
        }
        if self.algorithms.is_empty() {
            let hint = "name those that the issuer signs with, such as [\"RS256\"]";
            checker.report(&path, "is missing", hint);
            return;
        }
        let is_shared = |algorithm: &JwtAlgorithm| *algorithm == JwtAlgorithm::Hs256;
        let has_secret = self.secret.is_some() || self.secret_file.is_some();
        if !self.algorithms.iter().any(is_shared) {
            if has_secret {
                let what = "must be [\"HS256\"] where the key is a secret";
                checker.report(
                    &path,
                    what,
                    "or give the issuer's public keys instead of the secret",
                );
            }
        } else if !self.algorithms.iter().all(is_shared) {
            let what = "has HS256 beside algorithms with public keys";
            checker.report(&path, what, "keep either HS256 or the others");
        } else if !has_secret {
            let what = "has HS256, and there is no secret";
            checker.report(
                &path,
                what,
                "set secret or secret_file, or name another algorithm",
            );
        }
    }

    /// Exactly one source of keys, and that one sound.
    fn check_keys(&self, checker: &mut Checker<'_>) {
        let secret = if self.secret_file.is_some() {
            "secret_file"
        } else {
            "secret"
        };
        let sources = [
            (secret, self.secret.is_some() || self.secret_file.is_some()),
            ("public_key_file", self.public_key_file.is_some()),
            ("jwks_url", self.jwks_url.is_some()),
        ];
        let mut given = sources
            .iter()
            .filter(|(_, is_given)| *is_given)
            .map(|(field, _)| *field);
        let (first, second) = (given.next(), given.next());
        if let Some(second) = second {
            let what = format!(
                "is a second source of keys beside {}",
                first.unwrap_or_default()
            );
            checker.report(&at(second), what, "keep one of the two");
        }
        if self
            .secret
            .as_ref()
            .is_some_and(|secret| secret.expose_secret().len() < MIN_SECRET_BYTES)
        {
            let hint = "`openssl rand -base64 32` makes one, for the issuer too";
            checker.report(
                &at(secret),
                format!("must be at least {MIN_SECRET_BYTES} bytes"),
                hint,
            );
        }
        if self
            .public_key
            .as_ref()
            .is_some_and(|key| !is_public_key(key.expose_secret()))
        {
            let hint = "it begins with -----BEGIN PUBLIC KEY-----; `openssl x509 -pubkey -noout` takes it out of a certificate";
            checker.report(
                &at("public_key_file"),
                "does not hold one public key in PEM form",
                hint,
            );
        }
        if self.jwks_url.as_ref().is_some_and(|url| !is_safe(url)) {
            let what =
                "must begin with https://, or http:// on this machine, and hold no credentials";
            checker.report(
                &at("jwks_url"),
                what,
                "whoever can change the keys on their way can sign tokens",
            );
        }
        let is_broken = sources
            .iter()
            .any(|(field, _)| checker.is_broken(&at(field)));
        if first.is_none() && !is_broken && !checker.is_broken(&at("algorithms")) {
            let hint = "set jwks_url, public_key_file or secret";
            checker.report(
                &at("jwks_url"),
                "is missing: nothing says where the keys are",
                hint,
            );
        }
    }
}

fn at(field: &str) -> [&str; 3] {
    ["auth", "jwt", field]
}

fn is_public_key(pem: &str) -> bool {
    let begins = pem.matches("-----BEGIN ").count();
    begins == 1
        && ["PUBLIC KEY", "RSA PUBLIC KEY"]
            .iter()
            .any(|kind| pem.contains(&format!("-----BEGIN {kind}-----")))
}

fn is_safe(url: &Url) -> bool {
    let is_here = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.to_canonical().is_loopback(),
        None => return false,
    };
    let has_credentials = !url.username().is_empty() || url.password().is_some();
    !has_credentials && (url.scheme() == "https" || (url.scheme() == "http" && is_here))
}

#[cfg(test)]
mod tests {
    use super::super::load::{ConfigFile, Sources};
    use super::super::{Config, Problem};
    use super::*;

    const SECRET: &str = "hunter2hunter2hunter2hunter2hunt";
    const SOUND: &str = "issuer = \"i\"\naudience = [\"a\"]\n";
    const RSA: &str = "algorithms = [\"RS256\"]\n";
    const URL: &str = "jwks_url = \"https://h/keys\"\n";

    fn load_with(table: &str, env: &[(&str, &str)]) -> Result<JwtConfig, Vec<String>> {
        let text = format!("[auth.jwt]\n{table}");
        let file = Some(ConfigFile::Text {
            name: "g.toml".to_owned(),
            text,
        });
        let env = env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        match Config::load(Sources {
            file,
            env,
            ..Sources::default()
        }) {
            Ok(config) => Ok(config.auth.jwt.unwrap()),
            Err(problems) => Err(problems.iter().map(Problem::to_string).collect()),
        }
    }

    fn load(table: &str) -> Result<JwtConfig, Vec<String>> {
        load_with(table, &[])
    }

    /// One problem, which begins and goes on like this.
    #[track_caller]
    fn assert_one(found: Result<JwtConfig, Vec<String>>, field: &str, parts: &[&str]) {
        let problems = found.unwrap_err();
        assert_eq!(problems.len(), 1, "{problems:#?}");
        let problem = &problems[0];
        assert!(
            problem.starts_with(&format!("auth.jwt.{field}")),
            "{problem}"
        );
        for part in parts {
            assert!(problem.contains(part), "{part} is not in: {problem}");
        }
        assert!(!problem.contains("hunter2"), "{problem}");
    }

    #[test]
    fn sound_settings_are_taken() {
        let jwt = load(&format!("{SOUND}{RSA}{URL}")).unwrap();
        assert_eq!(
            (jwt.leeway, jwt.jwks_refresh),
            (Duration::from_secs(30), Duration::from_mins(10))
        );
        assert_eq!(jwt.algorithms, [JwtAlgorithm::Rs256]);
        for url in [
            "http://127.0.0.1:1/k",
            "http://localhost/k",
            "http://[::1]:1/k",
            "https://h/k?policy=p",
        ] {
            load(&format!("{SOUND}{RSA}jwks_url = \"{url}\"")).unwrap();
        }
        let text =
            format!("{SOUND}algorithms = [\"HS256\"]\nsecret = \"{SECRET}\"\nleeway = \"0s\"");
        assert!(!format!("{:?}", load(&text).unwrap()).contains("hunter2"));
        let all = format!("{SOUND}algorithms = [\"RS256\", \"ES256\", \"EdDSA\"]\n{URL}");
        assert_eq!(load(&all).unwrap().algorithms.len(), 3);
    }

    #[test]
    fn everything_comes_from_the_environment_too() {
        let env = [
            ("THREADKEEPER_AUTH__JWT__ISSUER", "i"),
            ("THREADKEEPER_AUTH__JWT__AUDIENCE", "[\"a\"]"),
            ("THREADKEEPER_AUTH__JWT__ALGORITHMS", "[\"EdDSA\"]"),
            ("THREADKEEPER_AUTH__JWT__JWKS_URL", "https://h/k"),
            ("THREADKEEPER_AUTH__JWT__LEEWAY", "1m"),
        ];
        let jwt = load_with("", &env).unwrap();
        assert_eq!(
            (jwt.algorithms.as_slice(), jwt.leeway),
            (&[JwtAlgorithm::EdDsa][..], Duration::from_mins(1))
        );
        let flat = [("THREADKEEPER_AUTH_JWT_ISSUER", "i")];
        let problems = load_with(&format!("{SOUND}{RSA}{URL}"), &flat).unwrap_err();
        assert!(
            problems[0].contains("did you mean THREADKEEPER_AUTH__JWT__ISSUER?"),
            "{problems:?}"
        );
    }

    #[test]
    fn what_is_required_is_missed_all_at_once() {
        let problems = load("").unwrap_err();
        let fields: Vec<&str> = problems
            .iter()
            .filter_map(|problem| problem.split(':').next())
            .collect();
        assert_eq!(
            fields,
            [
                "auth.jwt.issuer",
                "auth.jwt.audience",
                "auth.jwt.algorithms"
            ]
        );
        assert_one(
            load(&format!("{SOUND}{RSA}")),
            "jwks_url",
            &["where the keys are"],
        );
        assert_one(
            load(&format!(
                "issuer = \"i\"\naudience = [\"a\", \"\"]\n{RSA}{URL}"
            )),
            "audience",
            &["empty"],
        );
    }

    #[test]
    fn unknown_algorithms_are_refused_with_the_known_ones() {
        for word in ["none", "RS512", "rs256"] {
            let found = load(&format!("{SOUND}algorithms = [\"{word}\"]\n{URL}")).unwrap_err();
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(
                found[0].contains("expected one of \"HS256\", \"RS256\", \"ES256\", \"EdDSA\""),
                "{found:?}"
            );
        }
    }

    #[test]
    fn there_is_one_source_of_keys() {
        let secret = format!("secret = \"{SECRET}\"\n");
        let hmac = "algorithms = [\"HS256\"]\n";
        assert_one(
            load(&format!("{SOUND}{hmac}{secret}{URL}")),
            "jwks_url",
            &["second source of keys beside secret"],
        );
        assert_one(
            load(&format!("{SOUND}{hmac}{URL}")),
            "algorithms",
            &["there is no secret"],
        );
        assert_one(
            load(&format!("{SOUND}{RSA}{secret}")),
            "algorithms",
            &["must be [\"HS256\"]"],
        );
        let mixed = format!("{SOUND}algorithms = [\"HS256\", \"RS256\"]\n{secret}");
        assert_one(
            load(&mixed),
            "algorithms",
            &["HS256 beside algorithms with public keys"],
        );
        let mixed = format!("{SOUND}algorithms = [\"HS256\", \"RS256\"]\n{URL}");
        assert_one(
            load(&mixed),
            "algorithms",
            &["HS256 beside algorithms with public keys"],
        );
    }

    #[test]
    fn secrets_are_long_and_may_be_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let with = |line: String| load(&format!("{SOUND}algorithms = [\"HS256\"]\n{line}"));
        assert_one(
            with("secret = \"hunter2hunter2hunter2\"".to_owned()),
            "secret",
            &["at least 32 bytes", "openssl"],
        );
        let short = file("short", "hunter2\n");
        assert_one(
            with(format!("secret_file = '{short}'")),
            "secret_file",
            &["at least 32 bytes"],
        );
        assert_one(
            with("secret_file = '/no/such/file'".to_owned()),
            "secret_file",
            &["cannot be read"],
        );
        let good = file("good", &format!("{SECRET}\n"));
        let jwt = with(format!("secret_file = '{good}'")).unwrap();
        assert_eq!(jwt.secret.unwrap().expose_secret(), SECRET);
        let both = with(format!("secret_file = '{good}'\nsecret = \"{SECRET}\""));
        assert_one(both, "secret_file", &["secret is set as well"]);
        // A higher layer replaces both spellings.
        let env = [("THREADKEEPER_AUTH__JWT__SECRET_FILE", good.as_str())];
        load_with(
            &format!("{SOUND}algorithms = [\"HS256\"]\nsecret = \"x\""),
            &env,
        )
        .unwrap();
    }

    #[test]
    fn the_public_key_is_one_public_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            load(&format!(
                "{SOUND}{RSA}public_key_file = '{}'",
                path.display()
            ))
        };
        let key = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n";
        assert_eq!(
            load(key).unwrap().public_key.unwrap().expose_secret(),
            key.trim_end()
        );
        for wrong in [
            "hunter2",
            &key.replace("PUBLIC", "PRIVATE"),
            &key.replace("PUBLIC KEY", "CERTIFICATE"),
            &key.repeat(2),
        ] {
            assert_one(
                load(wrong),
                "public_key_file",
                &["one public key in PEM form", "BEGIN PUBLIC KEY"],
            );
        }
        assert_one(load("\n"), "public_key_file", &["is empty"]);
    }

    #[test]
    fn keys_come_over_a_safe_way() {
        for url in [
            "http://h/keys",
            "http://127.0.0.1.example.com/keys",
            "http://10.0.0.1/keys",
            "ftp://localhost/keys",
            "https://u:hunter2@h/keys",
            "file:///keys",
        ] {
            let found = load(&format!("{SOUND}{RSA}jwks_url = \"{url}\""));
            assert_one(found, "jwks_url", &["must begin with https://"]);
        }
        assert_one(
            load(&format!("{SOUND}{RSA}jwks_url = \"hunter2\"")),
            "jwks_url",
            &["not a URL"],
        );
    }

    #[test]
    fn ranges_and_claims_are_checked() {
        let sound = format!("{SOUND}{RSA}{URL}");
        for (line, field, part) in [
            ("leeway = \"301s\"", "leeway", "at most 5 minutes"),
            (
                "jwks_refresh = \"29s\"",
                "jwks_refresh",
                "from 30 seconds to 24 hours",
            ),
            (
                "jwks_refresh = \"25h\"",
                "jwks_refresh",
                "from 30 seconds to 24 hours",
            ),
            ("tenant_claim = \"\"", "tenant_claim", "is empty"),
            ("admin_claim = \"\"", "admin_claim", "is empty"),
            ("admin_value = \"x\"", "admin_value", "without admin_claim"),
            (
                "public_key = \"x\"",
                "public_key",
                "no such setting; did you mean `public_key_file`?",
            ),
        ] {
            assert_one(load(&format!("{sound}{line}")), field, &[part]);
        }
    }
}
