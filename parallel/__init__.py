"""Meshes, plans and engines: how a model is spread over processes."""
