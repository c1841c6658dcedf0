"""Stores: files with atomic replacement in a folder or a bucket, leases, journals."""
