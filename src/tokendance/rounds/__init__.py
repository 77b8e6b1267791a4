"""What agents say: parts, separators, segments, prompts and traces. Imports no other room."""
