//! Checks the claims of a token with a valid signature, and reads the caller from them. Pure.

use std::time::Duration;

use serde_json::{Map, Value};

use super::errors::JwtRefusal;
use crate::config::JwtConfig;
use crate::domain::{Access, Fingerprints, Principal, TenantKey, Timestamp, UserKey};

pub(super) type Claims = Map<String, Value>;

/// The configured rules for claims.
pub(super) struct Rules {
    issuer: String,
    audience: Vec<String>,
    leeway: Duration,
    tenant_claim: Option<String>,
    admin_claim: Option<String>,
    admin_value: Option<String>,
    fingerprints: Fingerprints,
}

impl Rules {
    pub(super) fn new(config: &JwtConfig, fingerprints: Fingerprints) -> Self {
        Self {
            issuer: config.issuer.clone(),
            audience: config.audience.clone(),
            leeway: config.leeway,
            tenant_claim: config.tenant_claim.clone(),
            admin_claim: config.admin_claim.clone(),
            admin_value: config.admin_value.clone(),
            fingerprints,
        }
    }

    /// Returns the caller whom the claims prove at the time `now`.
    pub(super) fn principal(
        &self,
        claims: &Claims,
        now: Timestamp,
    ) -> Result<Principal, JwtRefusal> {
        self.check_parties(claims)?;
        self.check_times(claims, now)?;
        let user = text(claims.get("sub"))
            .and_then(|user| UserKey::try_from(user.to_owned()).ok())
            .ok_or(JwtRefusal::Invalid(
                "its `sub` is missing or no valid key of a user",
            ))?;
        let tenant = self.tenant(claims)?;
        // All tokens of a user have one name.
        let name = format!("jwt:{}", self.fingerprints.user(&tenant, &user));
        Ok(if self.is_admin(claims) {
            Principal {
                tenant,
                access: Access::Admin,
                user: None,
                name,
            }
        } else {
            Principal {
                tenant,
                access: Access::Chat,
                user: Some(user),
                name,
            }
        })
    }

    fn check_parties(&self, claims: &Claims) -> Result<(), JwtRefusal> {
        if text(claims.get("iss")) != Some(&self.issuer) {
            return Err(JwtRefusal::Invalid("its issuer is missing or another one"));
        }
        let is_ours = |value: &Value| {
            value
                .as_str()
                .is_some_and(|name| self.audience.iter().any(|own| own == name))
        };
        if !claims
            .get("aud")
            .is_some_and(|claim| is_or_has(claim, is_ours))
        {
            return Err(JwtRefusal::Invalid(
                "its audience is missing or another one",
            ));
        }
        Ok(())
    }

    fn check_times(&self, claims: &Claims, now: Timestamp) -> Result<(), JwtRefusal> {
        let now = Duration::from_millis(u64::try_from(now.timestamp_millis()).unwrap_or_default());
        let latest_start = now.saturating_add(self.leeway);
        let Some(end) = time(claims, "exp")? else {
            return Err(JwtRefusal::Invalid("it does not say when it expires"));
        };
        if now >= end.saturating_add(self.leeway) {
            return Err(JwtRefusal::Invalid("it has expired"));
        }
        if time(claims, "nbf")?.is_some_and(|start| start > latest_start) {
            return Err(JwtRefusal::Invalid("it is not valid yet"));
        }
        if time(claims, "iat")?.is_some_and(|issued| issued > latest_start) {
            return Err(JwtRefusal::Invalid("it was issued in the future"));
        }
        Ok(())
    }

    fn tenant(&self, claims: &Claims) -> Result<TenantKey, JwtRefusal> {
        let Some(path) = &self.tenant_claim else {
            return Ok(TenantKey::default());
        };
        text(find(claims, path))
            .and_then(|tenant| TenantKey::try_from(tenant.to_owned()).ok())
            .ok_or(JwtRefusal::Invalid(
                "its claim of the tenant is missing or no valid key of a tenant",
            ))
    }

    fn is_admin(&self, claims: &Claims) -> bool {
        let Some(claim) = self
            .admin_claim
            .as_ref()
            .and_then(|path| find(claims, path))
        else {
            return false;
        };
        match &self.admin_value {
            Some(wanted) => is_or_has(claim, |value| value.as_str() == Some(wanted)),
            None => claim.as_bool() == Some(true),
        }
    }
}

/// Returns the claim with this name, or else the claim at this path with dots. Names with dots, such as
/// `https://example.com/roles`, are common, so the whole name comes first.
fn find<'a>(claims: &'a Claims, path: &str) -> Option<&'a Value> {
    claims.get(path).or_else(|| {
        let mut keys = path.split('.');
        let first = claims.get(keys.next()?)?;
        keys.try_fold(first, |value, key| value.as_object()?.get(key))
    })
}

fn text(claim: Option<&Value>) -> Option<&str> {
    claim.and_then(Value::as_str)
}

/// Returns whether the claim, or an entry of it if it is a list, meets the condition.
fn is_or_has(claim: &Value, is_wanted: impl Fn(&Value) -> bool) -> bool {
    match claim {
        Value::Array(entries) => entries.iter().any(is_wanted),
        single => is_wanted(single),
    }
}

/// Reads a time in seconds since 1970, with or without a fraction. `None` if the claim is missing.
fn time(claims: &Claims, name: &str) -> Result<Option<Duration>, JwtRefusal> {
    let Some(claim) = claims.get(name) else {
        return Ok(None);
    };
    let whole = claim.as_u64().map(Duration::from_secs);
    let time = whole.or_else(|| Duration::try_from_secs_f64(claim.as_f64()?).ok());
    time.map(Some).ok_or(JwtRefusal::Invalid(
        "one of `exp`, `nbf` and `iat` is no time in seconds",
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn config() -> JwtConfig {
        JwtConfig {
            issuer: "https://issuer".to_owned(),
            audience: vec!["chat".to_owned(), "other".to_owned()],
            ..JwtConfig::default()
        }
    }

    /// Valid claims with these changes. `null` removes a claim.
    fn claims(changes: &Value) -> Claims {
        let sound =
            json!({ "iss": "https://issuer", "aud": "chat", "exp": NOW + 60, "sub": "alice" });
        let Value::Object(mut claims) = sound else {
            panic!("an object")
        };
        for (name, value) in changes.as_object().unwrap() {
            if value.is_null() {
                claims.remove(name)
            } else {
                claims.insert(name.clone(), value.clone())
            };
        }
        claims
    }

    fn judge(config: &JwtConfig, changes: &Value) -> Result<Principal, JwtRefusal> {
        let now = Timestamp::from_timestamp(NOW, 0).unwrap();
        Rules::new(config, Fingerprints::new(&[7; 32])).principal(&claims(changes), now)
    }

    #[track_caller]
    fn assert_refused(config: &JwtConfig, changes: &Value, part: &str) {
        let Err(JwtRefusal::Invalid(why)) = judge(config, changes) else {
            panic!("{changes} is taken")
        };
        assert!(why.contains(part), "{changes}: {why}");
    }

    #[test]
    fn a_user_is_their_subject() {
        let principal = judge(&config(), &json!({})).unwrap();
        assert_eq!(principal.user.unwrap().as_str(), "alice");
        assert_eq!(
            (principal.tenant, principal.access),
            (TenantKey::default(), Access::Chat)
        );
        let alice = UserKey::try_from("alice".to_owned()).unwrap();
        let fingerprint = Fingerprints::new(&[7; 32]).user(&TenantKey::default(), &alice);
        assert_eq!(principal.name, format!("jwt:{fingerprint}"));
        for sub in [
            json!(null),
            json!(""),
            json!(7),
            json!("a\nb"),
            json!("x".repeat(257)),
            json!(["alice"]),
        ] {
            assert_refused(&config(), &json!({ "sub": sub }), "`sub`");
        }
    }

    #[test]
    fn names_tell_users_apart_and_tenants() {
        let config = JwtConfig {
            tenant_claim: Some("t".to_owned()),
            ..config()
        };
        let name = |tenant: &str, sub: &str| {
            judge(&config, &json!({ "t": tenant, "sub": sub }))
                .unwrap()
                .name
        };
        assert_eq!(name("a", "bc"), name("a", "bc"));
        assert_ne!(name("a", "bc"), name("ab", "c"));
        assert_ne!(name("a", "b"), name("b", "a"));
    }

    #[test]
    fn the_issuer_and_the_audience_are_ours() {
        for iss in [
            json!(null),
            json!("https://issuer/"),
            json!(["https://issuer"]),
            json!(1),
        ] {
            assert_refused(&config(), &json!({ "iss": iss }), "issuer");
        }
        for aud in [
            json!(null),
            json!("cha"),
            json!([]),
            json!(["x", ["chat"]]),
            json!({ "chat": 1 }),
            json!(1),
        ] {
            assert_refused(&config(), &json!({ "aud": aud }), "audience");
        }
        for aud in [json!("other"), json!(["x", "chat"]), json!([1, "chat"])] {
            assert!(judge(&config(), &json!({ "aud": aud })).is_ok(), "{aud}");
        }
    }

    #[test]
    fn times_hold_to_the_second_of_the_leeway() {
        let with = |seconds: u64| JwtConfig {
            leeway: Duration::from_secs(seconds),
            ..config()
        };
        for leeway in [0, 30, 300] {
            let end = NOW - i64::try_from(leeway).unwrap();
            let start = NOW + i64::try_from(leeway).unwrap();
            assert!(judge(&with(leeway), &json!({ "exp": end + 1 })).is_ok());
            assert!(judge(&with(leeway), &json!({ "nbf": start, "iat": start })).is_ok());
            assert_refused(&with(leeway), &json!({ "exp": end }), "expired");
            assert_refused(&with(leeway), &json!({ "nbf": start + 1 }), "not valid yet");
            assert_refused(&with(leeway), &json!({ "iat": start + 1 }), "in the future");
        }
        #[expect(clippy::cast_precision_loss, reason = "it is exact")]
        let fraction = NOW as f64 + 0.5;
        assert!(judge(&with(0), &json!({ "exp": fraction })).is_ok());
        assert_refused(&with(0), &json!({ "nbf": fraction }), "not valid yet");
        assert!(judge(&with(300), &json!({ "exp": u64::MAX })).is_ok());
    }

    #[test]
    fn times_are_numbers_and_the_end_is_there() {
        assert_refused(
            &config(),
            &json!({ "exp": null }),
            "does not say when it expires",
        );
        for (name, value) in [
            ("exp", json!("1900000000")),
            ("exp", json!(-1)),
            ("exp", json!(1e300)),
            ("exp", json!([NOW + 60])),
            ("nbf", json!("0")),
            ("iat", json!({})),
        ] {
            assert_refused(&config(), &json!({ name: value }), "no time in seconds");
        }
    }

    #[test]
    fn the_tenant_is_claimed() {
        let config = |path: &str| JwtConfig {
            tenant_claim: Some(path.to_owned()),
            ..config()
        };
        let tenant = |path: &str, changes: &Value| {
            judge(&config(path), changes).map(|p| p.tenant.as_str().to_owned())
        };
        assert_eq!(
            tenant("org", &json!({ "org": "acme" })),
            Ok("acme".to_owned())
        );
        assert_eq!(
            tenant("org.id", &json!({ "org": { "id": "acme" } })),
            Ok("acme".to_owned())
        );
        let url = "https://example.com/tenant";
        assert_eq!(tenant(url, &json!({ url: "acme" })), Ok("acme".to_owned()));
        for org in [
            json!(null),
            json!(""),
            json!(1),
            json!(["acme"]),
            json!("a\u{7}"),
            json!("x".repeat(257)),
        ] {
            assert_refused(&config("org"), &json!({ "org": org }), "tenant");
        }
        assert_refused(&config("org.id"), &json!({ "org": "id" }), "tenant");
    }

    #[test]
    fn an_admin_is_claimed_as_configured_and_in_no_other_way() {
        let access = |path: &str, value: Option<&str>, changes: &Value| {
            let (admin_claim, admin_value) = (Some(path.to_owned()), value.map(str::to_owned));
            let principal = judge(
                &JwtConfig {
                    admin_claim,
                    admin_value,
                    ..config()
                },
                changes,
            )
            .unwrap();
            assert_eq!(principal.user.is_none(), principal.access == Access::Admin);
            principal.access
        };
        for (path, value, changes) in [
            ("admin", None, json!({ "admin": true })),
            ("role", Some("boss"), json!({ "role": "boss" })),
            ("roles", Some("boss"), json!({ "roles": ["x", "boss"] })),
            (
                "realm.roles",
                Some("boss"),
                json!({ "realm": { "roles": ["boss"] } }),
            ),
            ("a.b/roles", Some("boss"), json!({ "a.b/roles": "boss" })),
            ("a.b.c", None, json!({ "a": { "b": { "c": true } } })),
        ] {
            assert_eq!(access(path, value, &changes), Access::Admin, "{changes}");
        }
        for (path, value, changes) in [
            ("admin", None, json!({})),
            ("admin", None, json!({ "admin": false })),
            ("admin", None, json!({ "admin": "true" })),
            ("admin", None, json!({ "admin": 1 })),
            ("admin", None, json!({ "admin": [true] })),
            ("role", Some("boss"), json!({ "role": "bossy" })),
            ("role", Some("boss"), json!({ "role": true })),
            ("role", Some("boss"), json!({ "role": { "boss": true } })),
            ("roles", Some("boss"), json!({ "roles": [["boss"]] })),
            (
                "a.b",
                Some("boss"),
                json!({ "a": ["b", "boss"], "b": "boss" }),
            ),
        ] {
            assert_eq!(access(path, value, &changes), Access::Chat, "{changes}");
        }
        // Without a configured claim there are no admins. An admin needs a subject too.
        assert_eq!(
            judge(&config(), &json!({ "admin": true })).unwrap().access,
            Access::Chat
        );
        let config = JwtConfig {
            admin_claim: Some("admin".to_owned()),
            ..config()
        };
        assert_refused(&config, &json!({ "admin": true, "sub": null }), "`sub`");
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            prop_oneof![Just("chat".to_owned()), any::<String>()].prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-c]", inner, 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn whatever_is_claimed_nothing_panics(
            fields in prop::collection::btree_map("iss|aud|exp|nbf|iat|sub|a", any_json(), 0..7),
        ) {
            let config = JwtConfig {
                tenant_claim: Some("a.b".to_owned()),
                admin_claim: Some("a.c".to_owned()),
                ..config()
            };
            let changes = Value::Object(fields.into_iter().collect());
            if let Ok(principal) = judge(&config, &changes) {
                prop_assert_eq!(principal.user.is_none(), principal.access == Access::Admin);
            }
        }
    }
}
