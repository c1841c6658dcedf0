"""The steps of `tools/gpu_session.py` that are programs of their own, each with a file of figures as its result."""
