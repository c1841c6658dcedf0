"""Nights: runs compared with each other and with a baseline."""
