"""A checkpoint folder as it is found, its processor, and what is refused."""
