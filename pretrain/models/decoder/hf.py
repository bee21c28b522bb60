"""Hugging Face key tables and config maps of the decoder brands."""

from typing import Any

BRANDS: dict[str, Any] = {}
