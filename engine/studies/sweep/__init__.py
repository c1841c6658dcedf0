"""`study sweep`: fields of a job crossed, a cell for each combination, all in one run on shared noise."""
