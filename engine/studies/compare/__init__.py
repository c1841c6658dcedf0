"""`compare`: two runs, or a run and a pinned baseline."""
