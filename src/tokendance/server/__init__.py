"""An OpenAI-compatible server whose concurrent requests become rounds."""
