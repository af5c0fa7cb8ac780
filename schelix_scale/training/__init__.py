"""Plan, loop, checkpoints and refresh of a training."""
