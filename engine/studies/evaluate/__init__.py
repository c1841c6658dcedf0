"""`evaluate`: distances, features and slices of a run against real images."""
