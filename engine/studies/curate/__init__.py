"""`curate`: selection among the samples of a run by a reward, given or learned from preferences."""
