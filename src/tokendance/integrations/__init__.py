"""The collector inside other engines."""
