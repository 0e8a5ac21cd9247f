"""From what a client sends for an image to pixels: never a path, and no address that the operator did not name."""
