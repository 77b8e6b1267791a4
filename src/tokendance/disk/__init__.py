"""Sessions on disk: their words, and the KV of what their agents have read and said."""
