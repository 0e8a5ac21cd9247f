"""The way of a request: it is let in, its images are prepared and encoded, it gets a slot, and its tokens come."""
