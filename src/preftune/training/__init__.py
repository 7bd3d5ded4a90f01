"""From losses to weights: updates, the outer loop, checkpoints, metrics."""
