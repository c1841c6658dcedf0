"""Scheduling as a pure state machine: no clock, files or processes, so that a simulation can drive it."""
