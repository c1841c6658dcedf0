"""Guidance: criteria, per-sample step rules, and the wrapper that composes them around a denoiser. Pure torch."""
