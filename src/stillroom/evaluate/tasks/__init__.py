"""Tasks: benchmarks, described by a local file or known to lm-eval by name."""
