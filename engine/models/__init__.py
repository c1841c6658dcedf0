"""Loading diffusion, CLIP and classifier models, and what they need: precision, attention, preprocessing."""
