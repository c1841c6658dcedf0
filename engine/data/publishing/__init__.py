"""Pushing a complete run or export to the Hugging Face Hub: what is pushed of it, and how it gets there."""
