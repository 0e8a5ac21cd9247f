"""A bundle as a model of lmms-eval."""
