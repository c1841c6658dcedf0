"""`rescore`: new scores of a run's images by other classifiers."""
