"""The choice of the layers that score the patches."""
