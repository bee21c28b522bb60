"""Building blocks of models: torch only, no process groups."""
