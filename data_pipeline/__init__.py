"""Text and images into WebDataset shards, and shards into batches."""
