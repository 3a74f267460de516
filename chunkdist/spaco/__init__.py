"""Which chunks are backpropagated, with which weights (SpaCO, arXiv 2505.16710, section 4)."""
