"""The paper's theorems, measured: what repeating and joining do to deltas (arXiv 2503.10705)."""
