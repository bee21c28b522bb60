"""What layouts of a model on N GPUs need and how fast they are, predicted without a GPU."""
