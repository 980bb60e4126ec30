"""The run directory: names, atomic writes, manifests, the lock, events, scores, checkpoints."""
