"""Benchmarks: what docs/benchmarks holds, and what the README quotes. Each prints a table and writes a JSON file.

They import torch, transformers and peft only, so that they run where nothing else is installed.
"""
