"""How long a step takes, predicted: FLOPs, bytes moved and launches of each cell against a card's ceilings.

A figure to choose schedules by, not a measurement: what kernels reach of a ceiling is assumed, and the same
for all cards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from chunkdist.config import ChunkConfig
from chunkdist.memory.cards import Card
from chunkdist.memory.model_sizes import ModelSizes, Weights
from chunkdist.memory.row_parts import exchanged_bytes
from chunkdist.memory.sharded import SINGLE, Engine, HostTraffic
from chunkdist.models.flops import StepFlops, num_pairs

MATMUL_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.7, 0.55, 0.8, 0.8
"""What kernels are taken to reach of a card's ceilings."""
HOST_MEMORY_BANDWIDTH = 51.2e9
"""Rate of the host's memory, bytes/s: two channels of DDR4-3200, a desktop's. The optimizer's update on the
host goes through it."""
_LAUNCH_S = 5e-6
_LAUNCHES, _LAUNCHES_OF_ADAPTERS = (42, 95), (69, 130)
"""Seconds of one launch; and how many a cell has in a run of its layer and in that run's backward, as counted
for Llama-3-8B trained in full, and with adapters in fp32 on all matrices under autocast (torch 2.14)."""
_FORWARD_TILE, _TILES_AT_ONCE = 128, 2
"""Queries of a block of flash attention's forward, and blocks that a multiprocessor runs side by side."""
_NO_TRAFFIC = HostTraffic()
_PASSES_OVER_GRAPH = 3
"""How often the bytes of a cell's graph go through the memory: written, read, and as gradients."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds.

    Args:
        compute_s: Time of the cells and the head.
        host_s: Time of the copies to and from the host, beside them.
        collectives_s: Time of gathers and reductions, beside them.
        exchange_s: Time of what ranks that share rows exchange in attention, between the kernels.
        num_chunks: Chunks of a row: a group's first chunk in the backward, and its last one in the forward,
            are waited for.
        weights_s: Time of the copies of offloaded weights, and of gradients.
        overlaps_weights: Whether these run beside the cells.
        optimizer_s: Time of the optimizer on the host, which nothing runs beside.
    """

    compute_s: float
    host_s: float
    collectives_s: float
    num_chunks: int
    exchange_s: float = 0.0
    weights_s: float = 0.0
    overlaps_weights: bool = True
    optimizer_s: float = 0.0

    @property
    def seconds(self) -> float:
        """The slowest of those that run beside each other, and what nothing runs beside."""
        beside, alone = (self.weights_s, 0.0) if self.overlaps_weights else (0.0, self.weights_s)
        slowest = max(self.compute_s + self.exchange_s, self.host_s + beside, self.collectives_s)
        return slowest + alone + self.host_s / self.num_chunks + self.optimizer_s

    @property
    def seconds_in_turn(self) -> float:
        """Without any copy beside the cells."""
        copies = self.host_s + self.weights_s + self.collectives_s
        return self.compute_s + self.exchange_s + copies + self.optimizer_s


def step_time(
    sizes: ModelSizes,
    flops: StepFlops,
    config: ChunkConfig,
    card: Card,
    *,
    num_tokens: int,
    num_rows: int = 1,
    engine: Engine = SINGLE,
    host_bytes: int = 0,
    traffic: HostTraffic = _NO_TRAFFIC,
    num_micro_batches: int = 1,
    sequence_ranks: int = 1,
) -> StepTime:
    """Predicted time of one forward and backward of one rank, and of its share of an optimizer on the host.

    Args:
        config: Without `"auto"`.
        num_tokens: Tokens of a row, one sequence.
        host_bytes: What waits on the host: written once, read once.
        traffic: What offloaded weights, gradients and states cost.
        sequence_ranks: Ranks that share the row; `sizes` are then those of one rank's part.
    """
    num_layers, tokens = len(sizes.cells), num_tokens * num_rows // sequence_ranks
    height = num_layers if config.layers_per_group == "all" else int(config.layers_per_group)
    chunk = min(int(config.chunk_size), num_tokens)
    num_chunks = -(-num_tokens // chunk)
    retained = 0 if config.retained_chunks == "auto" else min(config.retained_chunks, num_chunks)
    again = 1 - retained / num_chunks
    trained = sizes.all_weights.num_trainable / max(1, sizes.all_weights.num_numbers)
    # Forward, rerun, gradients of inputs and of what is trained; K/V once more where they are rebuilt.
    passes = 1 + again + 1 + trained
    attention_reruns = again
    if config.rebuilds_kv and num_chunks > 1:  # all layers of a group, the last one up to its attention
        passes += 1 - (1 - _projections(sizes)) / height
        attention_reruns += 1 - 1 / height
    head = 2 * sizes.head_width * (sizes.stream.hidden_bytes // sizes.element_bytes)
    forward = flops.per_token / 3 - head
    matmul = tokens * (forward * passes + head * (2 + (sizes.head_numbers_trained > 0)))
    arithmetic_s = matmul / (card.flops * MATMUL_SHARE)
    busy = _busy_share(sizes, flops, card, chunk / sequence_ranks)
    for window, cost in flops.per_pair:
        forwards = 1 + (0 if config.keeps_attention_of(window, num_tokens) else attention_reruns)
        # The kernels' backward has five products, their forward two.
        products = cost / 3 * num_pairs(num_tokens, window) * (forwards / busy + 2.5)
        arithmetic_s += products * num_rows / sequence_ranks / (card.flops * ATTENTION_SHARE)
    moved = _bytes_moved(sizes, tokens=tokens, num_chunks=num_chunks, passes=passes)
    forward_launches, backward_launches = _LAUNCHES if trained == 1 else _LAUNCHES_OF_ADAPTERS
    runs = 1 + again  # and K/V once more, up to attention, or through all layers of a group but the last
    if config.rebuilds_kv and num_chunks > 1:
        runs += 0.5 if height == 1 else 1
    launches = _LAUNCH_S * num_layers * num_chunks * (runs * forward_launches + backward_launches)
    sent = exchanged_bytes(sizes, config, tokens, again) * (sequence_ranks - 1) / sequence_ranks
    sharded = 0
    if engine.num_ranks > 1:
        every = sizes.all_weights
        sharded = 2 * every.whole_trainable_bytes + (2 * every.whole_bytes if engine.shards_weights else 0)
    return StepTime(
        compute_s=max(arithmetic_s, launches) + moved / (card.bandwidth * BANDWIDTH_SHARE),
        host_s=2 * host_bytes / (card.host_bandwidth * LINK_SHARE),
        collectives_s=sharded / (card.link_bandwidth * LINK_SHARE),
        num_chunks=num_chunks,
        exchange_s=sent / (card.link_bandwidth * LINK_SHARE),
        weights_s=(traffic.into + traffic.out) / (card.host_bandwidth * LINK_SHARE),
        overlaps_weights=engine.overlaps_copies,
        optimizer_s=traffic.memory / (HOST_MEMORY_BANDWIDTH * BANDWIDTH_SHARE) / num_micro_batches,
    )


def _projections(sizes: ModelSizes) -> float:
    """The share of a layer's matrices that make queries, keys and values, by their width; of layers alike."""
    cell, weights = sizes.cells[-1], sizes.layers[-1]
    hidden = sizes.stream.hidden_bytes // sizes.element_bytes
    return min(1.0, hidden * (hidden + cell.kv_numbers) / max(1, weights.num_numbers))


def _bytes_moved(sizes: ModelSizes, *, tokens: int, num_chunks: int, passes: float) -> float:
    """Through the card's memory: graphs, and for each chunk the weights, their gradients, and the gradients
    of all keys before it."""
    graphs = _PASSES_OVER_GRAPH * tokens * sum(cell.saved.per_token for cell in sizes.cells)
    weights = passes * num_chunks * sum(w.whole_bytes for w in sizes.layers)
    sums = num_chunks * sum(w.num_trainable * _sum_bytes(w) for w in sizes.layers)
    of_keys = sum(2 * c.workspace_per_key + 2 * c.kv_numbers * sizes.kv_grad_bytes for c in sizes.cells)
    return graphs + weights + sums + of_keys * tokens * (num_chunks + 1) / 2


def _sum_bytes(weights: Weights) -> int:
    """Bytes that one number's gradient moves in a cell: written in 2 bytes, read, and added in fp32; fp32
    weights under autocast cast it in between."""
    return 20 if weights.whole_trainable_bytes > 2 * weights.num_trainable else 12


def _busy_share(sizes: ModelSizes, flops: StepFlops, card: Card, chunk_tokens: float) -> float:
    """The share of a card's multiprocessors that attention's forward keeps busy. A block of it has some
    queries of one head, and all their keys: the last wave of blocks may be a small one.

    Args:
        chunk_tokens: With all heads; ranks that share rows have more tokens, and as many times fewer heads.
    """
    attending = [cell for cell in sizes.cells if cell.kv_heads]
    if not attending:
        return 1.0
    head_dim = attending[0].kv_numbers // (2 * attending[0].kv_heads)
    width = sum(cost for _, cost in flops.per_pair) / 12 / len(attending)
    blocks = math.ceil(chunk_tokens / _FORWARD_TILE) * max(1, round(width / head_dim))
    at_once = card.num_multiprocessors * _TILES_AT_ONCE
    return blocks / (math.ceil(blocks / at_once) * at_once)
