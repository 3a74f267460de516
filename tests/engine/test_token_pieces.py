"""What is cut along its tokens is put together as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chunkdist.engine.token_pieces import cut, first_and_rest, joined, result_dims, tensors_of

WHOLE: list[Any] = [(torch.randn(2, 5, 3), None), {"scale": torch.ones(3), "hidden": torch.randn(2, 5)}]
DIMS = [1, None, 1]


@pytest.mark.parametrize("pieces_of", [cut, first_and_rest])
def test_cut_and_joined(pieces_of: Any) -> None:
    pieces = pieces_of(WHOLE, DIMS)
    assert len(pieces) > 1
    assert result_dims(WHOLE, pieces) == DIMS
    for x, y in zip(tensors_of(joined(pieces, DIMS)), tensors_of(WHOLE), strict=True):
        assert torch.equal(x, y)


def test_the_first_is_one_token() -> None:
    first, rest = first_and_rest(WHOLE, DIMS)
    assert [x.shape[1] for x in tensors_of(first) if x.ndim > 1] == [1, 1]
    assert [x.shape[1] for x in tensors_of(rest) if x.ndim > 1] == [4, 4]
