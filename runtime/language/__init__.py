"""Language backends: embeddings in, token ids out."""
