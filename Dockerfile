FROM rust:1.95-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY src src
COPY migrations migrations
# The tests are not built here; cargo only wants to see that the file it was told of exists.
RUN mkdir -p tests/it && echo 'fn main() {}' > tests/it/main.rs
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    if [ "$(uname -m)" = aarch64 ]; then export JEMALLOC_SYS_WITH_LG_PAGE=16; fi && \
    cargo build --locked --release && cp target/release/threadkeeper /threadkeeper && strip -g /threadkeeper

# glibc and the CA bundle that TLS to the upstream needs; no shell, not root.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /threadkeeper /usr/local/bin/threadkeeper
# A configuration is mounted at /etc/threadkeeper/gateway.toml, where every command looks for it; there need not be one.
ENV THREADKEEPER_SERVER__LISTEN=0.0.0.0:8080
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/usr/local/bin/threadkeeper", "health"]
ENTRYPOINT ["/usr/local/bin/threadkeeper"]
CMD ["serve"]
