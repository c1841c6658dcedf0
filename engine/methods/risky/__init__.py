"""RiskyDiff guidance: risk under conformity constraints (Yu et al., arXiv 2512.18722)."""
