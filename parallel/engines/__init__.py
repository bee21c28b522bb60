"""Lazy table of engines."""
