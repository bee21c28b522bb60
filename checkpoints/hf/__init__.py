"""Hugging Face conversion as data: rows, streaming, proof of equality."""
