"""Chunked gradients against unchunked ones."""

from chunkdist.check.gradients import check_gradients

__all__ = ["check_gradients"]
