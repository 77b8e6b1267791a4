"""Measurements: workloads, and the figures of docs/benchmarks.md."""
