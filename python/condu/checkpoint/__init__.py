"""Fusing checkpoints larger than memory, and larger than one machine: by ranges of elements."""
