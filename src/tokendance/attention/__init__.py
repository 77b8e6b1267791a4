"""The arithmetic: attention that reads shared KV where it lies. Imports no other room."""
