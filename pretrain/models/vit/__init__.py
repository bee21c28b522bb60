"""Vision transformers that classify."""
