"""The OpenAI-compatible front: HTTP in, messages to decode workers, tokens out. Owned by one event loop."""
