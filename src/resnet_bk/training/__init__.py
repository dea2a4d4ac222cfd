"""Training: data, the loop, state on disk, evaluation."""
