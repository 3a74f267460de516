from __future__ import annotations

import pytest

from chunkdist.data.long_tail import long_tailed_lengths
from chunkdist.pipeline.runs import pack_runs


def test_every_sequence_is_in_one_run_and_every_run_is_one_dependent_run() -> None:
    lengths = long_tailed_lengths(300, divisor=4)
    runs = pack_runs(lengths, 64)
    assert sorted(index for run in runs for index in run.sequences) == list(range(len(lengths)))
    assert [run.num_chunks for run in runs] == sorted((run.num_chunks for run in runs), reverse=True)
    assert max(run.num_chunks for run in runs) > 9
    for run in runs:
        assert run.lengths == tuple(lengths[index] for index in run.sequences)
        assert 0 <= run.num_empty < run.chunk_size
        assert run.stream().runs() == (range(run.num_chunks),)
        assert all(length <= run.chunk_size for length in run.lengths[1:])


def test_short_sequences_fill_the_last_chunk_of_a_long_one() -> None:
    """ChunkFlow's example: 4, 2, 1 and 1 units in chunks of 2; and one of 5, whose last chunk has room."""
    assert [run.sequences for run in pack_runs([4, 2, 1, 1], 2)] == [(0,), (1,), (2, 3)]
    packed = pack_runs([2, 1, 5, 1], 2)
    assert [run.sequences for run in packed] == [(2, 1), (0,), (3,)]
    assert [run.num_chunks for run in packed] == [3, 1, 1]
    assert [run.num_empty for run in packed] == [0, 0, 1]


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 0 tokens"):
        pack_runs([3, 0], 2)
    with pytest.raises(ValueError, match="chunk_size=0"):
        pack_runs([3], 0)
