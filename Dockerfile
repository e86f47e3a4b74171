FROM rust:1.95-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev make && rm -rf /var/lib/apt/lists/*
# ARM kernels have pages of up to 64 KiB, and jemalloc must know the largest that it may meet.
RUN if [ "$(uname -m)" = aarch64 ]; then \
        printf '[env]\nJEMALLOC_SYS_WITH_LG_PAGE = "16"\n' >> "$CARGO_HOME/config.toml"; \
    fi
WORKDIR /src
# The dependencies are a layer of their own, so a change of src does not compile them again. The crate is
# empty in it. Nothing of the empty crate may stay, because cargo takes what is newer than src as up to date.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src && touch src/lib.rs && echo 'fn main() {}' > src/main.rs && \
    cargo build --locked --release && cargo clean --locked --release --package threadkeeper && rm -r src
COPY build.rs ./
COPY migrations migrations
COPY src src
RUN cargo build --locked --release && strip -g -o /threadkeeper target/release/threadkeeper

# This image has glibc and the CA certificates for TLS to the upstream. It has no shell, and is not root.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /threadkeeper /usr/local/bin/threadkeeper
# Every command reads /etc/threadkeeper/gateway.toml if it exists. Mount the configuration there.
ENV THREADKEEPER_SERVER__LISTEN=0.0.0.0:8080
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/usr/local/bin/threadkeeper", "health"]
ENTRYPOINT ["/usr/local/bin/threadkeeper"]
CMD ["serve"]
