"""Benchmarks: float, simulated and real runtimes of one network (scripts/benchmark.py), and the GPU check."""
