"""Linear cross-entropy in tiles: the logits of a whole sequence never exist."""
