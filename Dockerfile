# The controller alone: one static program, no shell, not root. `make static` builds and measures the same program without a container runtime.
FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends musl-tools ca-certificates
WORKDIR /src
COPY . .
RUN make static

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /src/target/image/berth /berth
USER 65532:65532
ENTRYPOINT ["/berth"]
