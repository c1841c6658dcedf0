"""Sampling: denoisers, samplers and the loop over their steps, per-sample noise, checks of schedulers."""
