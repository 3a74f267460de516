"""Losses of single tokens are those of the plain model, at the positions of their own sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chunkdist import ChunkConfig, chunk_model
from chunkdist.chunking import token_losses
from chunkdist.loss import cross_entropy
from chunkdist.loss.by_position import LossByPosition, PositionSums, mean_table, range_name
from chunkdist.loss.token_losses import TokenLosses
from tests.helpers.models import batch, left_padded, packed_batch, padded_batch, tiny_llama
from tests.helpers.waits import Waits

LENGTHS = [23, 9, 31]


def by_lengths() -> dict[str, Any]:
    inputs = packed_batch(LENGTHS)
    del inputs["position_ids"]
    bounds = torch.tensor([0, 23, 32, 63], dtype=torch.int32)
    sizes = {"max_length_q": 31, "max_length_k": 31}
    return {**inputs, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **sizes}


def shared_beginnings() -> dict[str, Any]:
    inputs = batch(num_rows=3, num_tokens=30)
    inputs["input_ids"][:, :20] = inputs["input_ids"][0, :20]
    return {**inputs, "labels": inputs["input_ids"].clone()}


INPUTS: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "rows": (batch(num_rows=2), [[37], [37]]),
    "packed": (packed_batch(LENGTHS), [LENGTHS]),
    "lengths": (by_lengths(), [LENGTHS]),
    "right padding": (padded_batch(LENGTHS), [[n] for n in LENGTHS]),
    "left padding": (left_padded(LENGTHS, num_behind=3), [[n] for n in LENGTHS]),
    "shared": (shared_beginnings(), [[30]] * 3),
}


def expected_positions(name: str, lengths: list[list[int]]) -> list[int]:
    """Of the tokens that have a label, row by row."""
    inputs = INPUTS[name][0]
    found = []
    for row, own in enumerate(lengths):
        positions = [position for length in own for position in range(length)]
        if name == "left padding":
            positions = [-1] * (max(LENGTHS) - own[0]) + positions
        labels = inputs["labels"][row].tolist()
        found += [p for p, label in list(zip(positions, labels, strict=False))[1:] if label != -100]
    return found


@pytest.mark.parametrize("name", INPUTS)
def test_of_each_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", 1)  # tiles of 16 tokens
    inputs, lengths = INPUTS[name]
    plain = tiny_llama(num_layers=2, dtype=torch.float32, attn_implementation="sdpa")
    model = chunk_model(
        tiny_llama(num_layers=2, dtype=torch.float32), ChunkConfig(chunk_size=8, attention="math")
    )
    with token_losses(model) as found:
        loss = model(**inputs).loss
    model(**inputs)
    (losses,) = found
    targets = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    assert losses.has_label.equal(targets != -100)
    assert not losses.losses.requires_grad
    alone = torch.cat([_alone(plain, inputs, row, own, name) for row, own in enumerate(lengths)])
    torch.testing.assert_close(losses.losses[losses.has_label], alone, rtol=1e-4, atol=1e-4)
    assert losses.losses[~losses.has_label].abs().max() == 0
    torch.testing.assert_close(losses.losses.sum() / losses.has_label.sum(), loss, rtol=1e-6, atol=0)
    assert losses.positions[losses.has_label].tolist() == expected_positions(name, lengths)


def _alone(model: Any, inputs: dict[str, Any], row: int, lengths: list[int], name: str) -> Tensor:
    """The losses of a row's sequences, each in a forward of its own."""
    start = max(LENGTHS) - lengths[0] if name == "left padding" else 0
    found = []
    for length in lengths:
        ids, labels = (inputs[key][row, start : start + length] for key in ("input_ids", "labels"))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        every = F.cross_entropy(logits, labels[1:], reduction="none")
        found.append(every[labels[1:] != -100])
        start += length
    return torch.cat(found).detach()


def test_ranges() -> None:
    """A token counts where it is predicted, in the range of its own position, and nothing waits."""
    positions = torch.tensor([[1, 63, 64, 1023], [1024, 4096, 5_000_000, 9]])
    has_label = torch.ones(2, 4, dtype=torch.bool)
    has_label[1, 3] = False
    losses = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    sums = PositionSums()
    with Waits() as waits:
        sums.add(TokenLosses(losses=losses, has_label=has_label, positions=positions))
        sums.add(TokenLosses(losses=losses[:1], has_label=has_label[:1], positions=positions[:1]))
    assert waits.names == []
    found = LossByPosition.of(sums.take(torch.device("cpu")))
    assert found.table() == [
        [0, 64, 1.5, 4],
        [64, 128, 4.0, 2],
        [512, 1024, 8.0, 2],
        [1024, 2048, 16.0, 1],
        [4096, 8192, 32.0, 1],
        [2**22, 2**23, 64.0, 1],
    ]
    assert found.means() == {"0-1K": 30 / 8, "1-4K": 16.0, "4-16K": 32.0, "4M-": 64.0}
    assert sums.take(torch.device("cpu")).abs().sum() == 0
    assert range_name(2**18, 2**20) == "256K-1M"
    whole = found.table()
    assert mean_table([whole[:2], [[0, 64, 4.5, 2], [64, 128, None, 2]]]) == [
        [0, 64, 2.5, 6],
        [64, 128, 4.0, 2],
    ]
