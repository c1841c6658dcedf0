"""KLDB guidance toward the decision boundary (Gomes et al.)."""
