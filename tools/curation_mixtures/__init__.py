"""The loop on Gaussian mixtures over many seeds at once, for the figures in docs/curation.md."""
