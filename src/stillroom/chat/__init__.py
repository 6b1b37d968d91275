"""Chat: one prompt, answered by one model or by two side by side."""
