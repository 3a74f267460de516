"""The tokens of one forward: chunks, segments, and how they are read from what a caller passed."""
