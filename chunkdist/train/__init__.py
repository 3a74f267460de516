"""Training: options, trainers, callbacks, checkpoints, and how a run starts and ends."""
