"""Checkpoints and the saved model: written whole or not at all, checked when they are read."""
