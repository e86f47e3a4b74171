//! Shared by the tests of tokens: keys made for them, and the server of an issuer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use url::Url;

use super::jwks;
use crate::config::{JwtAlgorithm, JwtConfig};
use crate::domain;

pub(super) const SECRET: &str = "0123456789abcdef0123456789abcdef";
pub(super) const ISSUER: &str = "https://issuer.example.com/";

/// An issuer that signs tokens with its own key.
pub(super) struct Signer {
    pub(super) algorithm: JwtAlgorithm,
    pub(super) private: EncodingKey,
    pub(super) public_pem: String,
}

/// RSA keys are slow to make, so tests share them.
pub(super) static RSA: LazyLock<Signer> = LazyLock::new(|| Signer::new(JwtAlgorithm::Rs256));
pub(super) static OTHER_RSA: LazyLock<Signer> = LazyLock::new(|| Signer::new(JwtAlgorithm::Rs256));

impl Signer {
    pub(super) fn new(algorithm: JwtAlgorithm) -> Self {
        let public = |der: PublicKeyX509Der<'_>| pem("PUBLIC KEY", der.as_ref());
        let (private, public_pem) = match algorithm {
            JwtAlgorithm::Hs256 => (EncodingKey::from_secret(SECRET.as_bytes()), String::new()),
            JwtAlgorithm::Rs256 => {
                let pair = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).unwrap();
                let private: Pkcs8V1Der<'_> = pair.as_der().unwrap();
                let private = pem("PRIVATE KEY", private.as_ref());
                let private = EncodingKey::from_rsa_pem(private.as_bytes()).unwrap();
                (private, public(pair.public_key().as_der().unwrap()))
            }
            JwtAlgorithm::Es256 => {
                let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
                let private = EncodingKey::from_ec_der(pair.to_pkcs8v1().unwrap().as_ref());
                (private, public(pair.public_key().as_der().unwrap()))
            }
            JwtAlgorithm::EdDsa => {
                let pair = Ed25519KeyPair::generate().unwrap();
                let private = EncodingKey::from_ed_der(pair.to_pkcs8v1().unwrap().as_ref());
                (private, public(pair.public_key().as_der().unwrap()))
            }
        };
        Self {
            algorithm,
            private,
            public_pem,
        }
    }

    /// Signs a token with these claims.
    pub(super) fn sign(&self, id: Option<&str>, claims: &Value) -> String {
        let mut header = Header::new(jwks::library_name(self.algorithm));
        header.kid = id.map(str::to_owned);
        encode(&header, claims, &self.private).unwrap()
    }

    /// Signs a valid token.
    pub(super) fn token(&self, id: Option<&str>) -> String {
        self.sign(id, &claims())
    }

    /// Returns the public key as an entry of a key set.
    pub(super) fn jwk(&self, id: &str) -> Value {
        let jwk =
            Jwk::from_encoding_key(&self.private, jwks::library_name(self.algorithm)).unwrap();
        let mut jwk = serde_json::to_value(jwk).unwrap();
        jwk["kid"] = json!(id);
        jwk["use"] = json!("sig");
        jwk
    }
}

pub(super) fn pem(kind: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(64)
        .map(|line| std::str::from_utf8(line).unwrap())
        .collect();
    format!(
        "-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n",
        lines.join("\n")
    )
}

/// Returns claims that are valid now.
pub(super) fn claims() -> Value {
    json!({ "iss": ISSUER, "aud": "chat", "sub": "alice", "exp": domain::now().timestamp() + 300 })
}

/// Returns settings without a source of keys.
pub(super) fn config(algorithms: &[JwtAlgorithm]) -> JwtConfig {
    JwtConfig {
        issuer: ISSUER.to_owned(),
        audience: vec!["chat".to_owned()],
        algorithms: algorithms.to_vec(),
        ..JwtConfig::default()
    }
}

/// Advances the clock at once. It runs normally before and after.
pub(super) async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

#[derive(Clone)]
pub(super) enum Answer {
    Keys(Vec<Value>),
    Text(&'static str),
    Status(u16),
    /// A redirect to a valid key set.
    Redirect,
    /// A body above the limit, without an announced length.
    Huge,
    /// No answer, and the connection stays open.
    Silent,
    /// No answer, and the connection is closed.
    Broken,
}

/// The server of an issuer on loopback. Dropping it stops the server.
pub(super) struct Issuer {
    pub(super) url: Url,
    answer: Arc<Mutex<Answer>>,
    asked: Arc<AtomicUsize>,
    _work: JoinSet<()>,
}

impl Issuer {
    pub(super) async fn start(answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/keys", listener.local_addr().unwrap())
            .parse()
            .unwrap();
        let (answer, asked) = (Arc::new(Mutex::new(answer)), Arc::new(AtomicUsize::new(0)));
        let mut work = JoinSet::new();
        let (answers, count) = (Arc::clone(&answer), Arc::clone(&asked));
        work.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&answers), Arc::clone(&count)));
            }
        });
        Self {
            url,
            answer,
            asked,
            _work: work,
        }
    }

    pub(super) fn set(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }

    pub(super) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

async fn serve(mut stream: TcpStream, answer: Arc<Mutex<Answer>>, asked: Arc<AtomicUsize>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    asked.fetch_add(1, Ordering::SeqCst);
    let is_moved = head.starts_with(b"GET /moved ");
    let answer = answer.lock().unwrap().clone();
    let full = |status: &str, more: &str, body: &str| {
        format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\n{more}content-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let text = match answer {
        Answer::Keys(keys) => full("200 OK", "", &json!({ "keys": keys }).to_string()),
        Answer::Redirect if is_moved => {
            full("200 OK", "", &json!({ "keys": [RSA.jwk("a")] }).to_string())
        }
        Answer::Redirect => full("302 Found", "location: /moved\r\n", ""),
        Answer::Text(text) => full("200 OK", "", text),
        Answer::Status(status) => full(&format!("{status} No"), "", "{\"keys\":[]}"),
        Answer::Huge => {
            let filler = " ".repeat(4 * 1024 * 1024);
            format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{filler}{{\"keys\":[]}}")
        }
        Answer::Silent => std::future::pending().await,
        Answer::Broken => return,
    };
    let _ = stream.write_all(text.as_bytes()).await;
}
