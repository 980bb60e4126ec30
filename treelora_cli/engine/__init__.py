"""The engine: the stream loop, training, evaluation, checkpoints. Knows no method by name."""
