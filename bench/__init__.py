"""Benchmarks: JSON lines, with their baseline in the same run."""
