"""`study rounds`: a target is retrained on its failures, which are found again in the retrained one, and so on."""
