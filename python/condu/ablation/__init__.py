"""What each part of ConDU is worth: one thing changed at a time over the same fine-tuned models."""

from condu.ablation.study import ablate

__all__ = ["ablate"]
