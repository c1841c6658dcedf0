"""`riskforge study ablate`: which part of a risky recipe makes the failures? Each is taken away, with equal noise."""
