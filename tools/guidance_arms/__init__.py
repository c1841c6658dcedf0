"""Variants of guidance that were compared before one became the default: see `tools/guidance_study.py`."""
