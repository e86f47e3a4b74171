//! The seed of the random tests, and the share of them that a run of the suite tries.

use std::fmt::Write;
use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

/// Returns the seed that `THREADKEEPER_TEST_SEED` names. Without it, the seed is random and the
/// same for all tests of the process. The seed is printed, so that the report of a failure shows
/// it.
pub(crate) fn seed() -> u64 {
    static SEED: LazyLock<u64> = LazyLock::new(|| match std::env::var("THREADKEEPER_TEST_SEED") {
        Ok(text) => text.parse().expect("THREADKEEPER_TEST_SEED is a number"),
        Err(_) => RandomState::new().hash_one(0_u8),
    });
    println!("THREADKEEPER_TEST_SEED={}", *SEED);
    *SEED
}

/// Whether to try everything. Otherwise each run of the suite tries another part.
pub(crate) fn is_thorough() -> bool {
    std::env::var_os("THREADKEEPER_TEST_THOROUGH").is_some()
}

/// Returns how many of `all` items to try: half of them, or all in a thorough run.
pub(crate) fn share_of(all: usize) -> usize {
    if is_thorough() { all } else { all.div_ceil(2) }
}

/// Returns this many hexadecimal digits, always the same, which a database cannot compress much.
pub(crate) fn noise(digits: usize) -> String {
    let (mut text, mut noise) = (String::with_capacity(digits + 8), 1_u64);
    while text.len() < digits {
        // Knuth's MMIX.
        noise = noise
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        write!(text, "{:08x}", noise >> 32).unwrap();
    }
    text.truncate(digits);
    text
}
