"""The self-consuming loop: a generator's curated samples train the next generator."""
