"""A checkpoint as the runtime reads it: its config, and its weights by their names."""
