"""What `tools/compare_checkouts.py` does with a checkout, and what it observes."""
