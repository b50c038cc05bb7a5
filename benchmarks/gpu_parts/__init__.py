"""Parts of `benchmarks/gpu.py`. Each has a function `cases` that returns what it measures, by name."""
