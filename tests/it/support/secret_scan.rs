//! Searches texts for secrets, in all encodings in which they may have been written.

use std::collections::HashMap;
use std::fmt::Write as _;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};

/// Texts to search for. Pieces of a text are found too, down to the length that was given with
/// the text.
pub(crate) struct Needles {
    /// Byte patterns, by their first eight bytes. Each has a description.
    patterns: HashMap<[u8; HEAD], Vec<(Vec<u8>, String)>>,
    /// The first two bytes of all patterns, so that the search skips most places of a text at
    /// once.
    beginnings: Vec<bool>,
}

/// Shortest length of a pattern, in bytes.
const HEAD: usize = 8;

impl Default for Needles {
    fn default() -> Self {
        Self {
            patterns: HashMap::new(),
            beginnings: vec![false; 1 << 16],
        }
    }
}

fn beginning(bytes: &[u8]) -> usize {
    usize::from(bytes[0]) << 8 | usize::from(bytes[1])
}

impl Needles {
    /// Adds each piece of `text` of `length` characters, plain and in all encodings.
    pub(crate) fn add(&mut self, name: &str, text: &str, length: usize) {
        assert!(
            text.len() >= length && length >= HEAD,
            "{name} is too short to be distinguished from other texts"
        );
        for piece in text.as_bytes().windows(length) {
            for (form, pattern) in forms(piece) {
                self.beginnings[beginning(&pattern)] = true;
                let head = pattern[..HEAD]
                    .try_into()
                    .expect("a pattern has at least this length");
                let same_head = self.patterns.entry(head).or_default();
                if !same_head.iter().any(|(other, _)| *other == pattern) {
                    same_head.push((pattern, format!("{name}, {form}")));
                }
            }
        }
    }

    /// Returns the first finding: its description and the text around it.
    pub(crate) fn find(&self, text: &[u8]) -> Option<String> {
        let begins = |(_, head): &(usize, &[u8])| self.beginnings[beginning(head)];
        text.windows(HEAD)
            .enumerate()
            .filter(begins)
            .find_map(|(at, head)| {
                let (_, what) = self
                    .patterns
                    .get(head)?
                    .iter()
                    .find(|(pattern, _)| text[at..].starts_with(pattern))?;
                let around = &text[at.saturating_sub(200)..text.len().min(at + 200)];
                Some(format!("{what}: …{}…", String::from_utf8_lossy(around)))
            })
    }
}

/// Returns the bytes in each of the supported encodings.
fn forms(piece: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let text = std::str::from_utf8(piece).expect("a planted text is ASCII");
    let escaped = serde_json::to_string(text).expect("a text is JSON");
    let escaped = escaped.trim_matches('"').to_owned();
    let twice = escaped.replace('\\', "\\\\").replace('"', "\\\"");
    let each = |write: &dyn Fn(&mut String, u8)| {
        let mut all = String::new();
        for byte in piece {
            write(&mut all, *byte);
        }
        all
    };
    let percent = |digits: &dyn Fn(u8) -> String| {
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.*".contains(byte);
        let one = |byte: &u8| {
            if is_plain(byte) {
                char::from(*byte).into()
            } else {
                digits(*byte)
            }
        };
        piece.iter().map(one).collect::<String>()
    };
    let hex = each(&|all, byte| write!(all, "{byte:02x}").expect("a string takes all"));
    let list = each(&|all, byte| write!(all, "{byte}, ").expect("a string takes all"));
    let mut all = vec![
        ("as it is", piece.to_vec()),
        ("escaped", escaped.into_bytes()),
        ("escaped twice", twice.into_bytes()),
        (
            "percent-encoded",
            percent(&|byte| format!("%{byte:02X}")).into_bytes(),
        ),
        (
            "percent-encoded",
            percent(&|byte| format!("%{byte:02x}")).into_bytes(),
        ),
        ("in hexadecimal", hex.to_uppercase().into_bytes()),
        ("in hexadecimal", hex.into_bytes()),
        (
            "as a list of numbers",
            list.trim_end_matches(", ").as_bytes().to_vec(),
        ),
    ];
    // The place within a group of three bytes decides the base64 digits. Digits that share bits
    // with neighbouring bytes are left out.
    for before in 0..3 {
        let shifted = [&vec![0; before], piece].concat();
        let (begin, end) = ((before * 8).div_ceil(6), shifted.len() * 8 / 6);
        for encoded in [
            STANDARD_NO_PAD.encode(&shifted),
            URL_SAFE_NO_PAD.encode(&shifted),
        ] {
            all.push(("in base64", encoded.as_bytes()[begin..end].to_vec()));
        }
    }
    all
}

/// Returns a text of 40 letters that occurs nowhere else, always the same for a name. None of the
/// letters is a hexadecimal digit.
pub(crate) fn planted(name: &str) -> String {
    const LETTERS: &[u8; 32] = b"ghjkmnpqrstvwxyzGHJKMNPQRSTVWXYZ";
    let digest =
        |part: u8| <sha2::Sha256 as sha2::Digest>::digest([name.as_bytes(), &[part]].concat());
    let bytes = digest(0).into_iter().chain(digest(1)).take(40);
    bytes
        .map(|byte| char::from(LETTERS[usize::from(byte % 32)]))
        .collect()
}

#[test]
fn planted_text_is_found_in_any_encoding() {
    let secret = format!("sk-{}\"\\/+%", planted("a secret"));
    let mut needles = Needles::default();
    needles.add("the secret", &secret, 8);
    let hex: String = secret
        .bytes()
        .fold(String::new(), |all, byte| format!("{all}{byte:02x}"));
    let written = [
        secret.clone(),
        secret[..8].to_owned(),
        secret[secret.len() - 8..].to_owned(),
        serde_json::to_string(&secret).unwrap(),
        format!("{secret:?}"),
        serde_json::to_string(&format!("{secret:?}")).unwrap(),
        url::form_urlencoded::byte_serialize(secret.as_bytes()).collect(),
        hex.to_uppercase(),
        hex,
        STANDARD_NO_PAD.encode(format!("u:{secret}")),
        STANDARD_NO_PAD.encode(format!("me:{secret}")),
        URL_SAFE_NO_PAD.encode(format!("you:{secret}")),
        format!("{:?}", secret.as_bytes()),
    ];
    for text in written {
        assert!(
            needles
                .find(format!("before {text} after").as_bytes())
                .is_some(),
            "{text}"
        );
    }
    for harmless in [&secret[..7], &planted("another"), "sk-", ""] {
        assert_eq!(needles.find(harmless.as_bytes()), None, "{harmless}");
    }
}
