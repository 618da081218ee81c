"""`python -m benchmarks`: how fast the service is beside a bare gRPC handler. Everything stays on the loopback."""
