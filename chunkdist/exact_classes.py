"""Causal LM classes that the sweep has found to be exact (docs/models.md), and that writes this file."""

TRANSFORMERS_VERSION = "5.23.0"

CLASSES = frozenset[str]()
