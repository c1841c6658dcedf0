"""Fine-tuning of the generator: the network of a pipeline's folder, whole or by low-rank updates.

`program.fine_tune_pipeline` is the entry; the other modules are its parts.
"""
