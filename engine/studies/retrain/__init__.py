"""`retrain`: fine-tuning a target on generated images, and its comparison."""
