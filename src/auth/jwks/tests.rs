use futures_util::FutureExt;
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::super::jwt::JwtVerifier;
use super::super::testing::{Answer, Issuer, OTHER_RSA, RSA, Signer, config, pass};
use super::*;
use crate::domain::Fingerprints;

fn verifier(issuer: &Issuer, algorithms: &[JwtAlgorithm]) -> JwtVerifier {
    let mut config = config(algorithms);
    config.jwks_url = Some(issuer.url.clone());
    JwtVerifier::new(&config, Fingerprints::new(&[7; 32])).unwrap()
}

fn rsa(issuer: &Issuer) -> JwtVerifier {
    verifier(issuer, &[JwtAlgorithm::Rs256])
}

async fn is_good(verifier: &JwtVerifier, token: &str) -> bool {
    match verifier.verify(token).await {
        Ok(_) => true,
        Err(JwtRefusal::Invalid(_)) => false,
        Err(JwtRefusal::Unavailable) => panic!("there are no keys"),
    }
}

async fn is_unavailable(verifier: &JwtVerifier) -> bool {
    verifier.verify(&RSA.token(Some("a"))).await == Err(JwtRefusal::Unavailable)
}

fn a_and_b() -> Answer {
    Answer::Keys(vec![RSA.jwk("a"), OTHER_RSA.jwk("b")])
}

fn only_a() -> Answer {
    Answer::Keys(vec![RSA.jwk("a")])
}

#[tokio::test]
async fn keys_of_all_kinds_are_fetched_once() {
    let (ec, ed) = (
        Signer::new(JwtAlgorithm::Es256),
        Signer::new(JwtAlgorithm::EdDsa),
    );
    let issuer = Issuer::start(Answer::Keys(vec![RSA.jwk("r"), ec.jwk("e"), ed.jwk("d")])).await;
    let all = [
        JwtAlgorithm::Rs256,
        JwtAlgorithm::Es256,
        JwtAlgorithm::EdDsa,
    ];
    let verifier = verifier(&issuer, &all);
    assert_eq!(issuer.asked(), 0, "not before there is a token");
    let tokens = [
        RSA.token(Some("r")),
        ec.token(Some("e")),
        ed.token(Some("d")),
        ed.token(None),
    ];
    assert!(
        join_all(tokens.iter().map(|token| is_good(&verifier, token)))
            .await
            .into_iter()
            .all(|good| good)
    );
    assert!(!is_good(&verifier, &OTHER_RSA.token(Some("r"))).await);
    assert_eq!(issuer.asked(), 1);
}

#[tokio::test]
async fn a_token_that_names_no_key_needs_one_that_is_the_only_one() {
    let ec = Signer::new(JwtAlgorithm::Es256);
    let issuer = Issuer::start(Answer::Keys(vec![
        RSA.jwk("a"),
        OTHER_RSA.jwk("b"),
        ec.jwk("c"),
    ]))
    .await;
    let both = verifier(&issuer, &[JwtAlgorithm::Rs256, JwtAlgorithm::Es256]);
    assert!(is_good(&both, &ec.token(None)).await);
    assert!(!is_good(&both, &RSA.token(None)).await);
    pass(PAUSE).await;
    assert!(!is_good(&both, &RSA.token(None)).await);
    assert_eq!(issuer.asked(), 1, "it names no key to look for");
}

#[tokio::test]
async fn a_new_key_is_found_at_once_and_one_that_is_gone_opens_nothing() {
    let issuer = Issuer::start(only_a()).await;
    let verifier = rsa(&issuer);
    assert!(is_good(&verifier, &RSA.token(Some("a"))).await);
    pass(SHORT_PAUSE).await;
    issuer.set(Answer::Keys(vec![OTHER_RSA.jwk("b")]));
    let token = OTHER_RSA.token(Some("b"));
    let all = join_all((0..20).map(|_| is_good(&verifier, &token))).await;
    assert!(
        all.into_iter().all(|good| good),
        "also those who came while it was fetched"
    );
    assert_eq!(issuer.asked(), 2);
    assert!(!is_good(&verifier, &RSA.token(Some("a"))).await);
}

#[tokio::test]
async fn invented_keys_make_one_fetch_at_most() {
    let issuer = Issuer::start(only_a()).await;
    let verifier = rsa(&issuer);
    assert!(is_good(&verifier, &RSA.token(Some("a"))).await);
    for round in 1..=3 {
        pass(PAUSE).await;
        let tokens: Vec<String> = (0..100)
            .map(|n| RSA.token(Some(&format!("{round}-{n}"))))
            .collect();
        let (together, after) = tokens.split_at(50);
        assert!(
            join_all(together.iter().map(|token| is_good(&verifier, token)))
                .await
                .iter()
                .all(|good| !good)
        );
        for token in after {
            assert!(!is_good(&verifier, token).await);
        }
        for n in 0..5 {
            pass(Duration::from_secs(5)).await;
            assert!(!is_good(&verifier, &RSA.token(Some(&format!("{round}-later-{n}")))).await);
        }
        assert_eq!(issuer.asked(), 1 + round);
        assert!(is_good(&verifier, &RSA.token(Some("a"))).await);
    }
}

#[tokio::test]
async fn an_old_set_is_fetched_again_by_one_request() {
    let issuer = Issuer::start(a_and_b()).await;
    let verifier = rsa(&issuer);
    let (a, b) = (RSA.token(Some("a")), OTHER_RSA.token(Some("b")));
    assert!(is_good(&verifier, &a).await);
    pass(Duration::from_mins(9)).await;
    assert!(is_good(&verifier, &b).await);
    assert_eq!(issuer.asked(), 1);
    issuer.set(only_a());
    pass(Duration::from_mins(1)).await;
    join_all((0..20).map(|_| is_good(&verifier, &a))).await;
    assert_eq!(issuer.asked(), 2);
    assert!(!is_good(&verifier, &b).await, "given up by the issuer");
}

#[tokio::test]
async fn others_do_not_wait_for_a_set_that_is_fetched_again() {
    let issuer = Issuer::start(only_a()).await;
    let verifier = rsa(&issuer);
    let token = RSA.token(Some("a"));
    assert!(is_good(&verifier, &token).await);
    pass(Duration::from_mins(10)).await;
    issuer.set(Answer::Silent);
    let mut first = std::pin::pin!(verifier.verify(&token));
    assert!((&mut first).now_or_never().is_none(), "it fetches");
    for _ in 0..10 {
        let other = verifier.verify(&token).now_or_never();
        assert!(
            other.is_some_and(|answer| answer.is_ok()),
            "it goes on with the old keys"
        );
    }
}

#[tokio::test]
async fn an_outage_is_bridged_for_a_day() {
    let issuer = Issuer::start(only_a()).await;
    let verifier = rsa(&issuer);
    let token = RSA.token(Some("a"));
    assert!(is_good(&verifier, &token).await);
    let mut asked = 1;
    for answer in [
        Answer::Status(500),
        Answer::Broken,
        Answer::Text("no"),
        Answer::Status(404),
    ] {
        issuer.set(answer);
        pass(Duration::from_mins(11)).await;
        for _ in 0..5 {
            assert!(is_good(&verifier, &token).await);
        }
        asked += 1;
        assert_eq!(issuer.asked(), asked, "not asked again so soon");
    }
    pass(Duration::from_hours(23)).await;
    assert!(is_good(&verifier, &token).await);
    pass(Duration::from_mins(20)).await;
    assert!(is_unavailable(&verifier).await);
    issuer.set(only_a());
    pass(SHORT_PAUSE).await;
    assert!(is_good(&verifier, &token).await);
}

#[tokio::test]
async fn bad_answers_are_no_keys() {
    let issuer = Issuer::start(Answer::Broken).await;
    let verifier = rsa(&issuer);
    for answer in [
        Answer::Broken,
        Answer::Status(204),
        Answer::Status(401),
        Answer::Status(503),
        Answer::Redirect,
        Answer::Text(""),
        Answer::Text("<html>"),
        Answer::Text("[]"),
        Answer::Text("{\"keys\":{}}"),
        Answer::Text("{}"),
        Answer::Huge,
    ] {
        issuer.set(answer);
        let asked = issuer.asked();
        assert!(is_unavailable(&verifier).await);
        assert!(is_unavailable(&verifier).await);
        assert_eq!(
            issuer.asked(),
            asked + 1,
            "one look, and no redirect followed"
        );
        pass(SHORT_PAUSE).await;
    }
    issuer.set(only_a());
    assert!(is_good(&verifier, &RSA.token(Some("a"))).await);
}

#[tokio::test]
async fn a_silent_server_is_left_in_time() {
    let issuer = Issuer::start(Answer::Silent).await;
    let verifier = rsa(&issuer);
    let begin = Instant::now();
    let token = RSA.token(Some("a"));
    let asked = async {
        while issuer.asked() == 0 {
            tokio::task::yield_now().await;
        }
        // From here on only timeouts happen.
        tokio::time::pause();
    };
    let (all, ()) = tokio::join!(join_all((0..50).map(|_| verifier.verify(&token))), asked);
    assert!(
        all.into_iter()
            .all(|answer| answer == Err(JwtRefusal::Unavailable))
    );
    assert!(
        begin.elapsed() <= TOTAL_TIMEOUT + SHORT_PAUSE,
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(issuer.asked(), 1, "not once for each that waited");
}

#[tokio::test]
async fn nobody_there_is_unavailable() {
    let issuer = Issuer::start(only_a()).await;
    let url = issuer.url.clone();
    drop(issuer);
    let mut config = config(&[JwtAlgorithm::Rs256]);
    config.jwks_url = Some(url);
    assert!(is_unavailable(&JwtVerifier::new(&config, Fingerprints::new(&[7; 32])).unwrap()).await);
}

#[tokio::test]
async fn a_fetch_that_is_left_goes_on_with_the_next() {
    let issuer = Issuer::start(only_a()).await;
    let verifier = rsa(&issuer);
    let token = RSA.token(Some("a"));
    {
        let mut left = std::pin::pin!(verifier.verify(&token));
        while issuer.asked() == 0 {
            assert!((&mut left).now_or_never().is_none());
            tokio::task::yield_now().await;
        }
    }
    for _ in 0..20 {
        assert!(is_good(&verifier, &token).await);
    }
    assert_eq!(issuer.asked(), 1);
    // Invented keys cause no more fetches either.
    pass(PAUSE).await;
    for n in 0..20 {
        assert!(
            verifier
                .verify(&RSA.token(Some(&n.to_string())))
                .now_or_never()
                .is_none()
        );
    }
    assert!(!is_good(&verifier, &RSA.token(Some("c"))).await);
    assert_eq!(issuer.asked(), 2);
}

#[tokio::test]
async fn who_hangs_up_keeps_no_key_from_the_others() {
    let issuer = Issuer::start(only_a()).await;
    let jwks = Jwks::new(
        issuer.url.clone(),
        Duration::from_mins(10),
        &[JwtAlgorithm::Rs256],
    )
    .unwrap();
    let find = |id: &'static str| jwks.find(Some(id), JwtAlgorithm::Rs256);
    assert!(find("a").await.is_ok());
    pass(PAUSE).await;
    issuer.set(a_and_b());
    assert!(find("c").now_or_never().is_none(), "it is looked for");
    // The fetch ends although nobody waits for it.
    drop(jwks.fetching.lock().await);
    pass(PAUSE / 2).await;
    assert!(find("b").await.is_ok());
    assert_eq!(issuer.asked(), 2);
}

#[tokio::test]
async fn a_key_that_is_not_known_is_not_refused_while_the_issuer_does_not_answer() {
    let issuer = Issuer::start(only_a()).await;
    let verifier = rsa(&issuer);
    let (known, new) = (RSA.token(Some("a")), OTHER_RSA.token(Some("b")));
    assert!(is_good(&verifier, &known).await);
    issuer.set(Answer::Status(503));
    for _ in 0..2 {
        pass(PAUSE / 2).await;
        assert_eq!(verifier.verify(&new).await, Err(JwtRefusal::Unavailable));
        assert!(is_good(&verifier, &known).await);
    }
    issuer.set(a_and_b());
    pass(PAUSE).await;
    assert!(is_good(&verifier, &new).await);
}

#[tokio::test]
async fn an_empty_set_is_believed() {
    let issuer = Issuer::start(Answer::Keys(Vec::new())).await;
    let verifier = rsa(&issuer);
    assert!(!is_good(&verifier, &RSA.token(Some("a"))).await);
    issuer.set(only_a());
    pass(SHORT_PAUSE).await;
    assert!(is_good(&verifier, &RSA.token(Some("a"))).await);
}

fn ids(keys: &[Value], algorithms: &[JwtAlgorithm]) -> Vec<String> {
    let body = json!({ "keys": keys }).to_string();
    let keys = read(body.as_bytes(), algorithms).unwrap();
    keys.iter().filter_map(|key| key.id.clone()).collect()
}

#[test]
fn only_keys_that_fit_are_used() {
    let (ec, ed) = (
        Signer::new(JwtAlgorithm::Es256),
        Signer::new(JwtAlgorithm::EdDsa),
    );
    let changed = |signer: &Signer, id: &str, changes: Value| {
        let mut jwk = signer.jwk(id);
        for (name, value) in changes.as_object().unwrap() {
            if value.is_null() {
                jwk.as_object_mut().unwrap().remove(name);
            } else {
                jwk[name] = value.clone();
            }
        }
        jwk
    };
    let rsa = |id: &str, changes: Value| changed(&RSA, id, changes);
    let keys = [
        rsa("plain", json!({})),
        rsa("no-use", json!({ "use": null, "alg": null })),
        rsa("verify", json!({ "use": null, "key_ops": ["verify"] })),
        rsa("odd-extras", json!({ "x5c": ["text"], "new": { "a": 1 } })),
        rsa("encryption", json!({ "use": "enc" })),
        rsa("sign-only", json!({ "use": null, "key_ops": ["sign"] })),
        rsa("other-alg", json!({ "alg": "RS512" })),
        rsa("hmac", json!({ "alg": "HS256" })),
        rsa("unknown-alg", json!({ "alg": "XS1" })),
        rsa("short", json!({ "n": "AQAB" })),
        rsa("no-base64", json!({ "n": "*".repeat(342) })),
        rsa("other-kty", json!({ "kty": "XX" })),
        rsa("number", json!({ "kid": 5 })),
        json!({ "kty": "oct", "k": "AAAA", "kid": "secret", "alg": "HS256" }),
        json!("text"),
        json!(null),
        ec.jwk("ec"),
        changed(&ec, "other-curve", json!({ "crv": "P-384" })),
        changed(&ec, "unknown-curve", json!({ "crv": "secp256k1" })),
        changed(&ec, "long", json!({ "x": "A".repeat(64) })),
        ed.jwk("ed"),
        changed(&ed, "x25519", json!({ "crv": "X25519" })),
    ];
    let rsa_keys = ["plain", "no-use", "verify", "odd-extras"];
    assert_eq!(ids(&keys, &[JwtAlgorithm::Rs256]), rsa_keys);
    assert_eq!(ids(&keys, &[JwtAlgorithm::Es256]), ["ec"]);
    assert_eq!(ids(&keys, &[JwtAlgorithm::EdDsa]), ["ed"]);
    assert!(
        ids(&keys, &[JwtAlgorithm::Hs256]).is_empty(),
        "a secret is never taken from a key set"
    );
}

#[test]
fn a_set_has_a_hundred_keys_at_most() {
    let keys: Vec<Value> = (0..150).map(|n| RSA.jwk(&n.to_string())).collect();
    let ids = ids(&keys, &[JwtAlgorithm::Rs256]);
    assert_eq!(
        (ids.len(), ids.last().map(String::as_str)),
        (100, Some("99"))
    );
}
