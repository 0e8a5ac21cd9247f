"""What a user gives: images, prompts, and the text and pixels that a model takes."""
