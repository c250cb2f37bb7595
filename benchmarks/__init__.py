"""Timings of the parts that cost: python -m benchmarks.run."""
