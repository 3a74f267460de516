"""What a run shows: the table at its start, metrics, W&B."""
