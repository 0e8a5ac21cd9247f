"""The decoder graphs: the language model, its rounded forms, and what only the last position needs."""
