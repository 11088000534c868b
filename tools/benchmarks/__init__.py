"""What the benchmarks share: interleaved timing, results as table and JSON, and the peers in C."""
