"""Files of a run: shards, commit records, plan, metadata, manifest, card (contract: output of a run, commit, resume).

Nothing here imports torch or ray; pyarrow is imported inside the functions that need it.
"""
