"""Token ids outside of a model: found wherever they are, however the lists are stored, in one quick pass."""

from __future__ import annotations

import time

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets

from chunkdist.data import token_ids
from chunkdist.data.loading import sample_kind
from chunkdist.data.ragged import BATCH_SAMPLES
from chunkdist.data.token_ids import first_outside, refuse_ids_outside


def refuse(dataset: Dataset, num_embeddings: int = 100, num_outputs: int = 100) -> bool:
    return refuse_ids_outside(
        dataset, name="train data", num_embeddings=num_embeddings, num_outputs=num_outputs
    )


def rows(count: int, **changed: list[int]) -> Dataset:
    """Samples of 1 to 7 tokens; `changed` has the last one's columns."""
    samples = [{"input_ids": [n % 100] * (1 + n % 7), "labels": [-100] * (1 + n % 7)} for n in range(count)]
    samples[-1] |= changed
    return Dataset.from_list(samples)


def test_ids_inside_are_fine() -> None:
    assert refuse(rows(600))
    assert not refuse(Dataset.from_dict({"input_ids": [[0, 99]], "labels": [[-100, 99]]}))


@pytest.mark.parametrize("count", [1, BATCH_SAMPLES, BATCH_SAMPLES + 1, 600])
@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"input_ids": [5, 100, 3]}, "the token id 100 is not among the 100"),
        ({"input_ids": [5, -100, 3]}, "the token id -100"),
        ({"input_ids": [2**40]}, "the token id 1099511627776"),
        ({"labels": [5, 100]}, "the label 100 is not among the 100"),
        ({"labels": [-100, -1]}, "the label -1"),
    ],
)
def test_the_sample_and_the_value_are_named(count: int, changed: dict[str, list[int]], word: str) -> None:
    with pytest.raises(ValueError, match=f"train data, sample {count - 1}: {word}"):
        refuse(rows(count, **changed))


def test_labels_are_held_to_the_output_layer() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1, 120]], "labels": [[1, 120]]})
    with pytest.raises(ValueError, match="the label 120 is not among the 100"):
        refuse(dataset, num_embeddings=128)
    refuse(dataset, num_embeddings=128, num_outputs=128)


def test_rows_chosen_joined_and_of_one_length() -> None:
    dataset = concatenate_datasets([rows(20), rows(300, input_ids=[7, 200])])
    with pytest.raises(ValueError, match=r"sample 319: the token id 200"):
        refuse(dataset)
    refuse(dataset.select(range(319)))
    with pytest.raises(ValueError, match=r"sample 2: the token id 200"):
        refuse(dataset.select([3, 4, 319, 5]))
    fixed = Features({name: List(Value("int32"), length=3) for name in ("input_ids", "labels")})
    same = Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [4, 5, 200]], "labels": [[1, 2, 3]] * 2}, features=fixed
    )
    with pytest.raises(ValueError, match=r"sample 1: the token id 200"):
        refuse(same)


def test_slices_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_ids, "_SLICE_TOKENS", 4)
    tokens = np.array([0, 1, -100, 3, 4, 5, -100, 7, 8, 99])
    assert first_outside(tokens, 100, allowed=-100) is None
    assert first_outside(tokens, 100, allowed=None) == 2
    assert first_outside(tokens, 99, allowed=-100) == 9
    assert first_outside(tokens[:0], 99, allowed=None) is None


def test_a_thousand_samples_of_8k_tokens_take_a_blink() -> None:
    """About 0.05 s on a busy CPU; a Python loop over the tokens takes 100 times as long."""
    ids = np.random.default_rng(0).integers(0, 32_000, (1_000, 8_192))
    dataset = Dataset.from_dict({name: list(ids) for name in ("input_ids", "labels")})
    start = time.process_time()
    sample_kind(dataset, text_field="text", name="it")
    refuse(dataset, 32_000, 32_000)
    assert time.process_time() - start < 1.0
