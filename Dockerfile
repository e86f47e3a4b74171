FROM rust:1.95-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY src src
COPY migrations migrations
# The tests are not built here, but cargo demands that their file exists.
RUN mkdir -p tests/it && echo 'fn main() {}' > tests/it/main.rs
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    if [ "$(uname -m)" = aarch64 ]; then export JEMALLOC_SYS_WITH_LG_PAGE=16; fi && \
    cargo build --locked --release && cp target/release/threadkeeper /threadkeeper && strip -g /threadkeeper

# This image has glibc and the CA certificates for TLS to the upstream. It has no shell, and is not root.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /threadkeeper /usr/local/bin/threadkeeper
# Every command reads /etc/threadkeeper/gateway.toml if it exists. Mount the configuration there.
ENV THREADKEEPER_SERVER__LISTEN=0.0.0.0:8080
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/usr/local/bin/threadkeeper", "health"]
ENTRYPOINT ["/usr/local/bin/threadkeeper"]
CMD ["serve"]
