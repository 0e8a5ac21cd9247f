"""Chat templates: strangers' programs that write a conversation as text."""
