"""Benchmarks and the demonstration (`matvae-bench`): they talk to a server only through the client."""
