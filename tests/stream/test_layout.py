"""Rows to a stream: each distinct path once, in an order in which trees are whole."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from chunkdist.stream.layout import Layout, PrefixRule, SequencePlace, lay_out
from chunkdist.stream.stream import Stream, cut, cut_segments, tokens_of_chunks

CPU = torch.device("cpu")
EVERY = PrefixRule()


def laid_out(rows: list[list[int]], rule: PrefixRule | None = EVERY) -> Layout:
    """Rows of tokens, from the left, and with padding behind."""
    num_tokens = max(map(len, rows))
    places = [SequencePlace(row, 0, len(ids)) for row, ids in enumerate(rows) if ids]
    keys = [torch.tensor(ids)[:, None] for ids in rows if ids]
    return lay_out((len(rows), num_tokens), places, CPU, keys=keys, rule=rule)


def tokens_of(rows: list[list[int]], layout: Layout) -> list[int]:
    padded = torch.tensor([[*ids, *[-1] * (layout.shape[1] - len(ids))] for ids in rows])
    found: list[int] = padded.flatten()[layout.sources].tolist()
    return found


def paths_of(layout: Layout, stream: Tensor) -> set[tuple[int, ...]]:
    """Each token with those before it in its sequence, read from segments and branches alone."""
    branches = layout.branches or (0,) * len(layout.segment_starts)
    before: list[tuple[int, ...]] = []
    for (start, end), branch in zip(
        pairwise((*layout.segment_starts, layout.num_tokens)), branches, strict=True
    ):
        for token in range(start, end):
            last = before[token - 1] if token > start else before[branch - 1] if branch else ()
            before.append((*last, int(stream[token])))
    return set(before)


def random_tree(rng: random.Random) -> list[list[int]]:
    trunk = [rng.randrange(3) for _ in range(rng.randrange(9))]
    rows = [trunk[: rng.randrange(len(trunk) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(7))]]
    while len(rows) < rng.randrange(2, 9):
        other = rng.choice(rows)
        rows.append(
            other[: rng.randrange(len(other) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(6))]
        )
    return rows if any(rows) else [[1]]


@pytest.mark.parametrize("seed", range(40))
def test_each_path_is_in_the_stream_once_and_each_token_finds_its_own(seed: int) -> None:
    rows = random_tree(random.Random(seed))
    layout = laid_out(rows)
    distinct = {tuple(ids[: end + 1]) for ids in rows for end in range(len(ids))}
    stream = torch.tensor(tokens_of(rows, layout))
    assert layout.num_tokens == len(distinct)
    assert paths_of(layout, stream) == distinct
    assert layout.num_passed == sum(map(len, rows))
    places = layout.places.view(layout.shape)
    for row, ids in enumerate(rows):
        own = places[row, : len(ids)]
        assert stream[own].tolist() == ids
        assert layout.positions[own].tolist() == list(range(len(ids)))


@pytest.mark.parametrize("seed", range(40))
def test_trees_are_whole_and_in_depth_first_order(seed: int) -> None:
    layout = laid_out(random_tree(random.Random(seed)))
    if not layout.branches:
        return
    stream = Stream(
        num_tokens=layout.num_tokens,
        chunks=cut(layout.num_tokens, 3),
        segment_starts=(layout.segment_starts,),
        branches=layout.branches,
    )
    path: list[range] = []
    for index, (start, end) in enumerate(pairwise((*layout.segment_starts, layout.num_tokens))):
        ancestors = [range(part.start, part.end) for part in reversed(stream.ancestors(index))]
        assert [x[: len(y)] for x, y in zip(path, ancestors, strict=False)] == ancestors  # of the one before
        path = [*ancestors, range(start, end)]
    readers = [
        {
            token
            for index, (start, end) in enumerate(pairwise((*layout.segment_starts, layout.num_tokens)))
            if (first := max(start, chunk.start)) < min(end, chunk.end)
            for part in (range(start, first), *(range(x.start, x.end) for x in stream.ancestors(index)))
            for token in part
            if token < chunk.start
        }
        for chunk in stream.chunks
    ]
    every = range(len(stream.chunks))
    for index, chunk in enumerate(stream.chunks):
        own = range(chunk.start, chunk.end)
        expected = any(token in own for seen in readers[index + 1 :] for token in seen)
        assert stream.is_read_later(index, every) == expected
    for run in stream.runs():
        assert all(token >= stream.chunks[run.start].start for index in run for token in readers[index])


def test_without_sharing_sequences_keep_their_order() -> None:
    rows = [[2, 1], [1], [2, 1, 3]]
    layout = laid_out(rows, rule=None)
    assert tokens_of(rows, layout) == [2, 1, 1, 2, 1, 3]
    assert (layout.segment_starts, layout.branches) == ((0, 2, 3), ())


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_branches_begin_where_chunks_end(seed: int, chunk_size: int) -> None:
    """With state between tokens: no chunk goes on from another by a single token."""
    rows = random_tree(random.Random(seed))
    layout = laid_out(rows, rule=PrefixRule(multiple=tokens_of_chunks(chunk_size)))
    chunks = cut_segments(layout.segment_starts, layout.num_tokens, chunk_size)
    stream = Stream(
        num_tokens=layout.num_tokens,
        chunks=chunks,
        segment_starts=(layout.segment_starts,),
        branches=layout.branches,
    )
    ends = {chunk.end for chunk in chunks}
    assert all(end in ends for end in layout.branches if end)
    assert all(chunk.num_tokens > 1 for chunk in chunks if stream.before(chunk) is not None)
    tokens, places = torch.tensor(tokens_of(rows, layout)), layout.places.view(layout.shape)
    paths = paths_of(layout, tokens)
    for row, ids in enumerate(rows):
        assert tokens[places[row, : len(ids)]].tolist() == ids
        assert all(tuple(ids[: end + 1]) in paths for end in range(len(ids)))
    for chunk in chunks:
        for start in stream.behind(chunk):
            following = next(other for other in chunks if other.start == start)
            assert stream.before(following) == chunk.end


def test_short_beginnings_are_not_shared() -> None:
    rows = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6]]
    assert laid_out(rows, rule=PrefixRule(least=3)).num_tokens == 8
    assert laid_out(rows, rule=PrefixRule(least=4)).branches == ()


def test_a_sequence_that_another_goes_on_from_is_one_segment_with_it() -> None:
    layout = laid_out([[1, 2, 3], [1], [1, 2]])
    assert (layout.num_tokens, layout.segment_starts, layout.branches) == (3, (0,), ())
