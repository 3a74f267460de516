"""Chunks as micro-batches of `torch.distributed.pipelining`: hidden states are sent, K/V stay in place."""
