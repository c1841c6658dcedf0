"""What a worker does: sample, score, encode."""
