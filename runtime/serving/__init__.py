"""The HTTP server: OpenAI's chat completions with images, for many clients at once. Needs the extra `serve`."""
