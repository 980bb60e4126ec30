"""The engine: the stream loop, one task's training, evaluation, checkpoints. Knows no method by name."""
