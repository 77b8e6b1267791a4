"""Measurements: workloads, fidelity, and the figures of docs/benchmarks.md."""
