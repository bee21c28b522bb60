"""Train loop, objectives, models, optimizers: what a run is."""
