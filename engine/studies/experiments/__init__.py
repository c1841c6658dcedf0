"""What studies share that make runs and end in a table, a figure and a page: sweep, transfer, ablate, rounds."""
