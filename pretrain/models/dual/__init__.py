"""Dual encoders: a tower for images, one for texts, and features that are compared."""
