"""The parts of `tools/bench_sampling.py`: models of every size, naive guidance, arms, arithmetic, checks, tables."""
