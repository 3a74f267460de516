"""TRL's trainers of preferences and of rewards, which truncate and drop nothing unasked and lose no work."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer, GRPOTrainer, RewardTrainer, extract_prompt

from chunkdist.data.pairs import LongPairs, fit_pairs
from chunkdist.train.launch.output import print_once
from chunkdist.train.trainers.checked import CheckedTrainer

if TYPE_CHECKING:
    from datasets import Dataset


class _PairTrainer(CheckedTrainer):
    """TRL (1.16) cuts, or leaves out, pairs that are too long without a word."""

    def __init__(self, *, long_samples: LongPairs, **kwargs: Any) -> None:
        self._long_samples = long_samples
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        whole = copy.copy(args)
        whole.max_length = None
        prepared: Any = super()._prepare_dataset(dataset, processing_class, whole, dataset_name)  # type: ignore[misc]
        return fit_pairs(
            prepared,
            max_length=args.max_length,
            long_samples=self._long_samples,
            name=f"{dataset_name} data",
            say=print_once,
        )


class CheckedDPOTrainer(_PairTrainer, DPOTrainer):
    """`DPOTrainer` whose samples are looked at."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Dataset:
        _refuse_empty_prompts(dataset, processing_class, name=f"{dataset_name} data")
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)


class CheckedRewardTrainer(_PairTrainer, RewardTrainer):
    """`RewardTrainer` whose samples are looked at."""


class CheckedGRPOTrainer(CheckedTrainer, GRPOTrainer):
    """`GRPOTrainer` that loses no work."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _refuse_empty_prompts(self.train_dataset, self.processing_class, name="train data")


def _refuse_empty_prompts(dataset: Any, tokenizer: Any, *, name: str) -> None:
    """Raises on a text that is no token: there is nothing to go on from."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer("")["input_ids"]:
        return
    if "prompt" in dataset.column_names:
        prompts, advice = dataset["prompt"], "'prompt' has no token: write some text"
    else:  # TRL (1.16) takes what both answers begin with, and most of the chosen one where that is nothing
        begin_alike = (sample["chosen"][:1] == sample["rejected"][:1] for sample in dataset)
        prompts = (
            is_alike and extract_prompt(sample)["prompt"]
            for is_alike, sample in zip(begin_alike, dataset, strict=True)
        )
        advice = (
            "there is no column 'prompt', and 'chosen' and 'rejected' do not begin alike: write the prompt "
            "into a column of its own, or before both"
        )
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"{name}, sample {index}: {advice}")
