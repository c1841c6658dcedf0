"""What people say about the images of a run: their answers, under `_review/` of its output."""
