"""Checkpoints in the layout of the original LLaVA code: what they have elsewhere, or not at all."""
