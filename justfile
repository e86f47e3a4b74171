# What CI runs, in the same order.
check:
    .ci/run

# A gateway with an embedded database and a simulated upstream.
dev:
    cargo run -- dev

# Everything: units, properties, and the binary against SQLite, Postgres and the simulator.
test:
    cargo test

# The same without what takes long: chaos, random operations, kills at every step, large databases, and much data.
test-quick:
    cargo test -- --skip chaos:: --skip api::random:: --skip api::crash_points:: --skip api::scale:: --skip api::fuzz:: \
        --skip api::pages:: --skip api::pictures:: --skip api::long_threads:: --skip api::replicas::rolling::

# One test by name, with its output.
test-one name:
    cargo test {{ name }} -- --nocapture

# The properties of the units with so many cases each (256 in CI): `just fuzz-units 20000`.
fuzz-units cases:
    PROPTEST_CASES={{ cases }} cargo test --lib

# Turns a second, messages that arrive faster, the cost of refusals: `just bench arrivals`. It reports, and fails nobody.
bench *what:
    cargo bench --bench load -- {{ what }}

# The container image.
image:
    docker build -t threadkeeper .

# Requests made from our own OpenAPI document, good and bad, on each protocol and store for so long: `just fuzz 10m`.
fuzz time:
    THREADKEEPER_FUZZ_FOR={{ time }} cargo test fuzz:: -- --nocapture

# Everything fails, at random, for so long: `just chaos 30m`.
chaos time:
    THREADKEEPER_CHAOS_FOR={{ time }} cargo test chaos:: -- --nocapture

# The documents as a site, in target/book. Needs mdBook: `cargo install mdbook --locked --no-default-features`.
book:
    mdbook build docs
