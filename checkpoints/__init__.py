"""Sharded, atomic, verified checkpoints and their conversion."""
