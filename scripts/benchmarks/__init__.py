"""The benchmarks behind ``scripts/bench NAME``."""
