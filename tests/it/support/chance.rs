//! What tests try at random.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

/// Chosen by the environment or, once for all tests of a process, by chance. A failure prints it.
pub(crate) fn seed() -> u64 {
    static SEED: LazyLock<u64> = LazyLock::new(|| match std::env::var("THREADKEEPER_TEST_SEED") {
        Ok(text) => text.parse().expect("THREADKEEPER_TEST_SEED is a number"),
        Err(_) => RandomState::new().hash_one(0_u8),
    });
    println!("THREADKEEPER_TEST_SEED={}", *SEED);
    *SEED
}

/// Whether all is to be tried that there is. If not, each run of the suite tries another part of it.
pub(crate) fn is_thorough() -> bool {
    std::env::var_os("THREADKEEPER_TEST_THOROUGH").is_some()
}

/// How much of something is tried: half of it, unless all is wanted.
pub(crate) fn share_of(all: usize) -> usize {
    if is_thorough() { all } else { all.div_ceil(2) }
}
