"""Measure float, simulated and real runtimes of one network side by side: scripts/benchmark.py."""
