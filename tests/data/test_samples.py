"""Tokenised samples: none is cut, dropped or left without a supervised token unasked."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from chunkdist.data.samples import fit_samples


def rows(*lengths: int, masked: dict[int, slice] | None = None) -> Dataset:
    """Samples of these lengths whose tokens are all different; `masked` labels are -100."""
    start, samples = 0, []
    for index, length in enumerate(lengths):
        ids = list(range(start, start + length))
        labels = list(ids)
        if masked and index in masked:
            labels[masked[index]] = [-100] * len(labels[masked[index]])
        samples.append({"input_ids": ids, "labels": labels})
        start += length
    return Dataset.from_list(samples)


def fit(dataset: Dataset, long_samples: Any = "error", **options: Any) -> tuple[list[list[int]], list[str]]:
    said: list[str] = []
    given: dict[str, Any] = {"max_length": 4, "is_text": True, **options}
    fitting = fit_samples(dataset, long_samples=long_samples, name="train data", say=said.append, **given)
    return [list(ids) for ids in fitting["input_ids"]], said


def test_samples_that_fit_are_left_alone() -> None:
    dataset = rows(2, 4, 3)
    assert fit_samples(dataset, max_length=4, long_samples="error", is_text=False, name="it") is dataset
    assert fit_samples(dataset, max_length=None, long_samples="error", is_text=False, name="it") is dataset


def test_a_long_sample_is_an_error_that_names_it() -> None:
    with pytest.raises(
        ValueError, match=r"1 of 3 samples .* max_length=4 tokens, sample 1 is the first with 5"
    ):
        fit(rows(2, 5, 3))


def test_truncate_drop_and_split_do_what_they_say() -> None:
    ids, said = fit(rows(2, 9), "truncate")
    assert ids == [[0, 1], [2, 3, 4, 5]]
    assert "only their first 4 tokens" in said[0]
    assert fit(rows(2, 9), "truncate", keep_end=True)[0] == [[0, 1], [7, 8, 9, 10]]
    ids, said = fit(rows(2, 9, 3), "drop")
    assert ids == [[0, 1], [11, 12, 13]]
    assert "1 of 3 samples" in said[0]
    ids, said = fit(rows(2, 9), "split")
    assert ids == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9], [10]]
    assert "2 samples became 4" in said[0]


def test_split_is_for_text_and_drop_leaves_some() -> None:
    with pytest.raises(ValueError, match="long_samples=split cuts plain text only"):
        fit(rows(9), "split", is_text=False)
    with pytest.raises(ValueError, match="long_samples=drop leaves none"):
        fit(rows(9, 9), "drop")


@pytest.mark.parametrize(
    "masked", [slice(None), slice(1, None)], ids=["all", "all but the first, never predicted"]
)
def test_a_sample_without_a_supervised_token_is_named(masked: slice) -> None:
    with pytest.raises(ValueError, match=r"train data, sample 2: no supervised token .* 1 of 4"):
        fit(rows(3, 3, 3, 3, masked={2: masked}))


def test_a_sample_of_one_token_has_nothing_to_predict() -> None:
    with pytest.raises(ValueError, match=r"sample 1 has one token: .* 2 of 4 samples are so: take them out"):
        fit(rows(3, 1, 2, 1))


def test_truncation_that_cuts_all_supervised_tokens_off_is_an_error() -> None:
    dataset = rows(3, 6, masked={1: slice(0, 4)})
    with pytest.raises(ValueError, match=r"sample 1: no supervised token .none is among its first 4 tokens"):
        fit(dataset, "truncate")
    assert len(fit(dataset, "truncate", keep_end=True)[0]) == 2


def test_selected_rows_are_measured_not_those_beneath() -> None:
    dataset = rows(9, 2, 3).select([1, 2])
    assert fit(dataset)[0] == [[9, 10], [11, 12, 13]]


def test_many_batches_are_counted_through() -> None:
    dataset = rows(*[2] * 2_500, 5)
    with pytest.raises(ValueError, match="sample 2500 is the first with 5"):
        fit(dataset)
