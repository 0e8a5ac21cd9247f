"""From a Hugging Face checkpoint to a verified bundle."""
