"""The files of a run: shards, commits, state, manifest, summary, card; their verification."""
