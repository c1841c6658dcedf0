"""Conditioning: class distributions of image embeddings, the error predictor, screened draws. Pure computation."""
