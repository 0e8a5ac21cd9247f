"""Sequences that come and go, in slots."""
