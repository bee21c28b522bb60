"""Training on a SLURM cluster."""
