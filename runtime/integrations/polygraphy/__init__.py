"""Polygraphy: engines as its runners, images as its data, a comparison of kept sets, and all of it in its command."""
