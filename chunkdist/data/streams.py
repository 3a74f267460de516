"""Token streams: whole sequences one after another in one row, with their boundaries. Nothing is padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from chunkdist.stream.stream import Stream, cut

NO_LABEL = -100


def join_sequences(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A stream as a model takes it: `input_ids`, `labels` and `position_ids`, (1, T) each.

    Positions start again with each sequence, from which a chunked model knows the boundaries; the first label
    of a sequence is ignored, since no token of its own comes before it.

    Args:
        samples: `input_ids` and, unless all tokens are supervised, `labels` of the same length. None: the
            stream of a rank that has nothing to do while others have: one token, masked, without a label.

    Raises:
        ValueError: a sample is empty, has not as many labels as tokens, or more than one dim.
    """
    if not samples:
        token = torch.zeros((1, 1), dtype=torch.long)
        return {"input_ids": token, "labels": token + NO_LABEL, "attention_mask": token.clone()}
    ids, labels, positions = [], [], []
    for number, sample in enumerate(samples):
        own_ids = torch.as_tensor(sample["input_ids"], dtype=torch.long)
        own_labels = torch.as_tensor(sample.get("labels", sample["input_ids"]), dtype=torch.long).clone()
        if own_ids.ndim != 1 or own_ids.numel() == 0 or own_ids.shape != own_labels.shape:
            raise ValueError(
                f"sequence {number} of a stream has tokens {tuple(own_ids.shape)} and labels "
                f"{tuple(own_labels.shape)}: pass as many of each, at least one, in one dim"
            )
        own_labels[0] = NO_LABEL
        ids.append(own_ids)
        labels.append(own_labels)
        positions.append(torch.arange(len(own_ids)))
    joined = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.cat(parts)[None] for name, parts in joined.items()}


def stream_of(lengths: Sequence[int], chunk_size: int) -> Stream:
    """How the engine will see a stream of sequences of these lengths: its chunks and segments."""
    starts = tuple(start for start, end in pairwise([0, *accumulate(lengths)]) if end > start)
    total = sum(lengths)
    return Stream(num_tokens=total, chunks=cut(total, chunk_size), segment_starts=(starts or (0,),))
