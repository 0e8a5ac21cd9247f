"""Checkpoints and bundles of the Hugging Face hub, by their ids."""
