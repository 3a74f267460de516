"""Benchmarks, whose results docs/benchmarks holds and the README quotes. Each prints a table and writes JSON.

They import torch, transformers and peft only, so that they run where nothing else is installed.
"""
