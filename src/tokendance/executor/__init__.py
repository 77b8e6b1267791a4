"""The executor: runs one step of a model, and keeps the keys and values."""
