"""Reading runs: rows, filters, samples for training, exports."""
