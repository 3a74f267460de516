"""Samples on their way to the trainer: checked, streamed, ordered."""
