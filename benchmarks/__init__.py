"""How fast the kernels and a training step are, against every peer, in one run. See docs/performance.md."""
