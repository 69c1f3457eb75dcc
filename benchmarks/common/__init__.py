"""What the benchmarks share: the measured blocks, timing, statistics, the rows of results, and the check of numbers."""
