"""Timings of training updates against a reference step; `python -m benchmarks.benchmark` runs them."""
