use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use futures_util::FutureExt;
use jsonwebtoken::{Algorithm, EncodingKey, encode};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::testing::{ISSUER, OTHER_RSA, RSA, SECRET, Signer, claims, config, pem};
use super::*;
use crate::domain::Access;

const ALL: [JwtAlgorithm; 4] = [
    JwtAlgorithm::Hs256,
    JwtAlgorithm::Rs256,
    JwtAlgorithm::Es256,
    JwtAlgorithm::EdDsa,
];

fn shared() -> JwtVerifier {
    let mut config = config(&[JwtAlgorithm::Hs256]);
    config.secret = Some(SECRET.into());
    JwtVerifier::new(&config, Fingerprints::new(&[7; 32])).unwrap()
}

fn public(signer: &Signer) -> JwtVerifier {
    with_pem(signer.algorithm, &signer.public_pem)
}

/// Builds a verifier with a PEM text as the loader reads it from a file, without the last line end.
fn with_pem(algorithm: JwtAlgorithm, pem: &str) -> JwtVerifier {
    let mut config = config(&[algorithm]);
    config.public_key = Some(pem.trim_end().into());
    JwtVerifier::new(&config, Fingerprints::new(&[7; 32])).unwrap()
}

/// Verifies with a fixed key, which needs no wait.
fn verify(verifier: &JwtVerifier, token: &str) -> Result<Principal, JwtRefusal> {
    verifier
        .verify(token)
        .now_or_never()
        .expect("nothing is waited for")
}

#[track_caller]
fn assert_refused(verifier: &JwtVerifier, token: &str, part: &str) {
    let Err(JwtRefusal::Invalid(why)) = verify(verifier, token) else {
        panic!("{token} is taken")
    };
    assert!(why.contains(part), "{why}");
}

fn part(json: &Value) -> String {
    URL_SAFE_NO_PAD.encode(json.to_string())
}

fn with_claim(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

/// Signs a token with the secret, under this header.
fn shared_token(header: &Value, claims: &Value) -> String {
    let message = format!("{}.{}", part(header), part(claims));
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
    format!("{message}.{signature}")
}

#[test]
fn good_tokens_of_each_algorithm_are_taken() {
    for algorithm in ALL {
        let signer = Signer::new(algorithm);
        let verifier = if algorithm == JwtAlgorithm::Hs256 {
            shared()
        } else {
            public(&signer)
        };
        for id in [None, Some("any")] {
            let principal = verify(&verifier, &signer.token(id)).unwrap();
            assert_eq!(principal.user.unwrap().as_str(), "alice");
            assert_eq!(principal.access, Access::Chat);
        }
    }
}

#[test]
fn public_keys_come_in_several_spellings() {
    let token = RSA.token(None);
    let lines = RSA.public_pem.replace('\n', "\r\n");
    let body: String = RSA
        .public_pem
        .lines()
        .filter(|line| !line.starts_with('-'))
        .collect();
    // The key without the first 24 bytes, which say that it is an RSA key.
    let plain = pem("RSA PUBLIC KEY", &STANDARD.decode(body).unwrap()[24..]);
    for text in [
        &lines,
        &plain,
        &format!("The issuer's key:\n\n{}", RSA.public_pem),
    ] {
        assert!(
            verify(&with_pem(JwtAlgorithm::Rs256, text), &token).is_ok(),
            "{text}"
        );
    }
}

#[test]
fn tokens_of_others_are_refused() {
    assert_refused(&public(&RSA), &OTHER_RSA.token(None), "signature");
    for algorithm in [JwtAlgorithm::Es256, JwtAlgorithm::EdDsa] {
        let (own, other) = (Signer::new(algorithm), Signer::new(algorithm));
        assert_refused(&public(&own), &other.token(None), "signature");
    }
    let other = EncodingKey::from_secret(b"another secret of 32 bytes or so");
    let token = encode(&Header::new(Algorithm::HS256), &claims(), &other).unwrap();
    assert_refused(&shared(), &token, "signature");
}

#[test]
fn a_token_does_not_choose_its_algorithm() {
    let signers = ALL.map(Signer::new);
    for own in &signers {
        let verifier = if own.algorithm == JwtAlgorithm::Hs256 {
            shared()
        } else {
            public(own)
        };
        for other in signers
            .iter()
            .filter(|other| other.algorithm != own.algorithm)
        {
            assert_refused(&verifier, &other.token(None), "not allowed");
        }
    }
    // Everybody knows the public key, so it must not work as a secret.
    for secret in [RSA.public_pem.as_bytes(), RSA.public_pem.trim().as_bytes()] {
        let forger = EncodingKey::from_secret(secret);
        let token = encode(&Header::new(Algorithm::HS256), &claims(), &forger).unwrap();
        assert_refused(&public(&RSA), &token, "not allowed");
    }
    // Another algorithm of the same family.
    let token = encode(&Header::new(Algorithm::RS512), &claims(), &RSA.private).unwrap();
    assert_refused(&public(&RSA), &token, "not allowed");
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let token = encode(&Header::new(Algorithm::HS512), &claims(), &key).unwrap();
    assert_refused(&shared(), &token, "not allowed");
}

#[test]
fn unsigned_tokens_are_refused() {
    for name in ["none", "None", "NONE", "nOnE", "", "hs256"] {
        let header = json!({ "alg": name, "typ": "JWT" });
        for verifier in [&shared(), &public(&RSA)] {
            for signature in ["", "AAAA"] {
                let token = format!("{}.{}.{signature}", part(&header), part(&claims()));
                assert_refused(verifier, &token, "known algorithm");
            }
            assert_refused(
                verifier,
                &shared_token(&header, &claims()),
                "known algorithm",
            );
        }
    }
    let good = Signer::new(JwtAlgorithm::Hs256).token(None);
    let (message, _) = good.rsplit_once('.').unwrap();
    assert_refused(&shared(), &format!("{message}."), "signature");
    assert_refused(&shared(), message, "JSON web token");
}

#[test]
fn whatever_is_changed_is_noticed() {
    for signer in ALL.map(Signer::new) {
        let verifier = if signer.algorithm == JwtAlgorithm::Hs256 {
            shared()
        } else {
            public(&signer)
        };
        let token = signer.token(None);
        let parts: Vec<&str> = token.split('.').collect();
        let bob = part(&with_claim("sub", json!("bob")));
        assert_refused(
            &verifier,
            &format!("{}.{bob}.{}", parts[0], parts[2]),
            "signature",
        );
        // The last digit of a part may have unused bits. A change of those may be refused differently.
        for at in (0..token.len()).step_by(7) {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert!(
                matches!(verify(&verifier, &changed), Err(JwtRefusal::Invalid(_))),
                "{at}"
            );
        }
    }
}

#[test]
fn headers_ask_for_nothing_that_is_not_understood() {
    let verifier = shared();
    for kind in ["JWT", "jwt", "at+jwt", "application/at+jwt"] {
        let token = shared_token(&json!({ "alg": "HS256", "typ": kind }), &claims());
        assert!(verify(&verifier, &token).is_ok(), "{kind}");
    }
    for kind in ["logout+jwt", "dpop+jwt", "JWE", ""] {
        let token = shared_token(&json!({ "alg": "HS256", "typ": kind }), &claims());
        assert_refused(&verifier, &token, "another type");
    }
    let token = shared_token(
        &json!({ "alg": "HS256", "crit": ["b64"], "b64": false }),
        &claims(),
    );
    assert_refused(&verifier, &token, "crit");
    // A key in the token's own header is ignored.
    let jwk = Signer::new(JwtAlgorithm::Es256);
    let mut header = Header::new(Algorithm::ES256);
    header.jwk = Some(serde_json::from_value(jwk.jwk("a")).unwrap());
    let token = encode(&header, &claims(), &jwk.private).unwrap();
    assert_refused(
        &public(&Signer::new(JwtAlgorithm::Es256)),
        &token,
        "signature",
    );
}

#[test]
fn the_claims_are_looked_at() {
    let signer = Signer::new(JwtAlgorithm::Hs256);
    let now = domain::now().timestamp();
    for (name, value, part) in [
        ("exp", json!(now - 31), "expired"),
        ("exp", json!(null), "no time"),
        ("nbf", json!(now + 40), "not valid yet"),
        ("iss", json!("https://other"), "issuer"),
        ("aud", json!("other"), "audience"),
        ("sub", json!(""), "`sub`"),
    ] {
        assert_refused(
            &shared(),
            &signer.sign(None, &with_claim(name, value)),
            part,
        );
    }
    for missing in ["iss", "aud", "exp", "sub"] {
        let mut claims = claims();
        claims.as_object_mut().unwrap().remove(missing);
        assert!(
            matches!(
                verify(&shared(), &signer.sign(None, &claims)),
                Err(JwtRefusal::Invalid(_))
            ),
            "{missing}"
        );
    }
    // Within the leeway.
    assert!(
        verify(
            &shared(),
            &signer.sign(None, &with_claim("exp", json!(now - 20)))
        )
        .is_ok()
    );
    assert!(
        verify(
            &shared(),
            &signer.sign(None, &with_claim("nbf", json!(now + 20)))
        )
        .is_ok()
    );
    // A claim given twice.
    let twice = format!("{{\"sub\":\"bob\",{}", &claims().to_string()[1..]);
    let message = format!(
        "{}.{}",
        part(&json!({ "alg": "HS256" })),
        URL_SAFE_NO_PAD.encode(twice)
    );
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
    assert_refused(
        &shared(),
        &format!("{message}.{signature}"),
        "cannot be read",
    );
}

#[test]
fn long_tokens_are_not_read() {
    let signer = Signer::new(JwtAlgorithm::Hs256);
    let padded = |n: usize| signer.sign(None, &with_claim("filler", json!("x".repeat(n))));
    assert!(verify(&shared(), &padded(5000)).is_ok());
    let long = padded(6200);
    assert!(long.len() > MAX_TOKEN_BYTES);
    assert_refused(&shared(), &long, "longer than 8 KiB");
    assert_refused(&shared(), &"x".repeat(10_000_000), "longer than 8 KiB");
}

#[test]
fn keys_that_do_not_fit_are_found_at_once() {
    use JwtAlgorithm::{EdDsa, Es256, Hs256, Rs256};
    let setup = |algorithms: &[JwtAlgorithm], secret: Option<&str>, pem: Option<&str>| {
        let mut config = config(algorithms);
        config.secret = secret.map(Into::into);
        config.public_key = pem.map(Into::into);
        JwtVerifier::new(&config, Fingerprints::new(&[7; 32])).map(drop)
    };
    let (ec, ed) = (
        Signer::new(JwtAlgorithm::Es256),
        Signer::new(JwtAlgorithm::EdDsa),
    );
    assert_eq!(setup(&[Rs256], None, Some(&RSA.public_pem)), Ok(()));
    assert_eq!(
        setup(&[Rs256, Es256], None, Some(&RSA.public_pem)),
        Err(JwtSetupError::PublicKey("ES256"))
    );
    assert_eq!(
        setup(&[Rs256], None, Some(&ec.public_pem)),
        Err(JwtSetupError::PublicKey("RS256"))
    );
    assert_eq!(
        setup(&[Es256], None, Some(&ed.public_pem)),
        Err(JwtSetupError::PublicKey("ES256"))
    );
    assert_eq!(
        setup(&[EdDsa], None, Some(&RSA.public_pem)),
        Err(JwtSetupError::PublicKey("EdDSA"))
    );
    assert_eq!(
        setup(&[Hs256], None, Some(&RSA.public_pem)),
        Err(JwtSetupError::PublicKey("HS256"))
    );
    assert_eq!(
        setup(&[Rs256], None, Some("text")),
        Err(JwtSetupError::PublicKey("RS256"))
    );
    let private = RSA.public_pem.replace("PUBLIC", "PRIVATE");
    assert_eq!(
        setup(&[Rs256], None, Some(&private)),
        Err(JwtSetupError::PublicKey("RS256"))
    );
    let short = pem("PUBLIC KEY", &short_rsa());
    assert_eq!(
        setup(&[Rs256], None, Some(&short)),
        Err(JwtSetupError::PublicKey("RS256"))
    );
    assert_eq!(
        setup(&[Rs256], Some(SECRET), None),
        Err(JwtSetupError::Secret("RS256"))
    );
    assert_eq!(
        setup(&[Hs256], Some(SECRET), Some(&RSA.public_pem)),
        Err(JwtSetupError::Source)
    );
    assert_eq!(setup(&[Hs256], None, None), Err(JwtSetupError::Source));
}

/// Returns a public key of 1024 bits. Its modulus is arbitrary.
fn short_rsa() -> Vec<u8> {
    let mut key = vec![0x30, 0x81, 0x89, 0x02, 0x81, 0x81, 0x00];
    key.extend([0xc1; 128]);
    key.extend([0x02, 0x03, 0x01, 0x00, 0x01]);
    let mut der = vec![0x30, 0x81, 0x9f, 0x30, 0x0d, 0x06, 0x09];
    der.extend([
        0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00, 0x03, 0x81, 0x8d, 0x00,
    ]);
    der.extend(key);
    der
}

#[test]
fn nothing_secret_is_shown() {
    let verifier = shared();
    assert!(!format!("{verifier:?} {:?}", config(&[])).contains(SECRET));
    let token = Signer::new(JwtAlgorithm::Hs256).sign(None, &with_claim("iss", json!("hunter2")));
    let refusal = verify(&verifier, &token).unwrap_err();
    assert!(!format!("{refusal} {refusal:?}").contains("hunter2"));
    let principal = verify(&verifier, &Signer::new(JwtAlgorithm::Hs256).token(None)).unwrap();
    assert!(!principal.name.contains("alice") && !principal.name.contains(ISSUER));
}

proptest! {
    #[test]
    fn arbitrary_text_is_refused(text in ".{0,200}|[A-Za-z0-9_=-]{0,60}(\\.[A-Za-z0-9_=-]{0,60}){0,4}") {
        for verifier in [&shared(), &public(&RSA)] {
            prop_assert!(matches!(verify(verifier, &text), Err(JwtRefusal::Invalid(_))));
        }
    }

    #[test]
    fn arbitrary_parts_are_refused(header in ".{0,80}", body in prop::collection::vec(any::<u8>(), 0..80)) {
        let (good, bad) = (json!({ "alg": "HS256" }).to_string(), header);
        for header in [good, bad] {
            let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(&body));
            let key = EncodingKey::from_secret(SECRET.as_bytes());
            let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
            let token = format!("{message}.{signature}");
            prop_assert!(verify(&shared(), &token).is_err());
        }
    }
}
