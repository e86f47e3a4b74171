# Runs the checks of CI, in the same order.
check:
    .ci/run

# Runs a gateway with SQLite and a simulated upstream.
dev:
    cargo run -- dev

# Runs all tests: units, properties, and the binary with SQLite, Postgres and the simulator.
test:
    cargo test

# Runs all tests but the slow ones: chaos, random operations, kills at every step, large databases, much data.
test-quick:
    cargo test -- --skip chaos:: --skip api::random:: --skip api::crash_points:: --skip api::scale:: --skip api::fuzz:: \
        --skip api::pages:: --skip api::pictures:: --skip api::long_threads:: --skip api::replicas::rolling::

# Runs one test by name, with its output.
test-one name:
    cargo test {{ name }} -- --nocapture

# Runs the property tests of the units with this number of cases each (256 in CI): `just fuzz-units 20000`.
fuzz-units cases:
    PROPTEST_CASES={{ cases }} cargo test --lib

# Measures runs a second, overload, and the cost of refusals: `just bench arrivals`. It never fails.
bench *what:
    cargo bench --bench load -- {{ what }}

# Builds the container image.
image:
    docker build -t threadkeeper .

# Sends requests made from /openapi.json, on each protocol and store, for this time: `just fuzz 10m`.
fuzz time:
    THREADKEEPER_FUZZ_FOR={{ time }} cargo test fuzz:: -- --nocapture

# Lets every part fail at random, for this time: `just chaos 30m`.
chaos time:
    THREADKEEPER_CHAOS_FOR={{ time }} cargo test chaos:: -- --nocapture

# Needs mdBook and its plug-in for diagrams:
# `cargo install --locked mdbook --no-default-features; cargo install --locked mdbook-mermaid`.
# Builds the site of the documents in target/book.
book:
    mdbook-mermaid install docs
    mdbook build docs
