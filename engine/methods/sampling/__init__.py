"""Sampling: denoiser adapters, the loop around diffusers' schedulers, per-sample noise. Pure torch."""
