"""`curate`: K-wise Bradley-Terry selection over a run."""
