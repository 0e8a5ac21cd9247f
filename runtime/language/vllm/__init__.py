"""A server of vLLM as the language model: images go there as embeddings, tokens come back as they are decoded."""
