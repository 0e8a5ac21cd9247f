"""From an image and a prompt to a streamed answer, with numpy and one inference engine."""
