"""Runs to look at: recorded from an engine's events, kept as a document, shown in a page."""
