"""Studies: small programs over the engine that answer a question about finished runs."""
