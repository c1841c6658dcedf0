"""Guidance by a criterion of the user's own."""
