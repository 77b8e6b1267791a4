"""The door: an OpenAI-compatible server whose concurrent requests become rounds."""
