"""Image-text shards: indexed, decoded, packed by two budgets (tokens and patches), paired for dual encoders."""
