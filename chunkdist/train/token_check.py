"""Token ids that the model of a trainer has no row for, looked for once, over all data, before it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from chunkdist.data.pairs import refuse_pair_ids_outside
from chunkdist.data.token_ids import outside, refuse_ids_outside
from chunkdist.train.launch.output import print_once

if TYPE_CHECKING:
    from chunkdist.train.trainers.checked import CheckedSFTTrainer


def check_token_ids(trainer: CheckedSFTTrainer) -> None:
    """Goes over the tokenised samples of a trainer whose model is there; of a stream over the first only.

    Raises:
        ValueError: a sample or the padding has an id that is not in the embedding, or a label that is not in
            the output layer; names the first one.
    """
    num_embeddings, num_outputs = num_rows(trainer.model)
    has_padding = bool(getattr(trainer.args, "pad_to_multiple_of", None))
    for name, (dataset, batch_size) in tokenized_data(trainer).items():
        differ = refuse_ids_outside(
            dataset, name=f"{name} data", num_embeddings=num_embeddings, num_outputs=num_outputs
        )
        has_padding |= differ and batch_size > 1
    for name, fit in trainer.streams.items():
        fit.limits = num_embeddings, num_outputs
        has_padding |= trainer.args.per_device_train_batch_size > 1 or name != "train"
    if trainer.streams:
        train: Any = trainer.train_dataset
        next(iter(train.once()), None)  # the first sample, before anything is written
    refuse_padding_outside(trainer, num_embeddings, is_used=has_padding)
    say_larger_tokenizer(trainer, num_embeddings)


def check_pair_ids(trainer: Any) -> None:
    """Goes over the tokenised pairs of a trainer; of prompts, which it tokenises later, over none.

    Raises:
        ValueError: a sample has an id that is not in the embedding; names the first one.
    """
    num_embeddings, _ = num_rows(trainer.model)
    for name, dataset in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if dataset is not None and "chosen_ids" in dataset.column_names:
            refuse_pair_ids_outside(dataset, name=f"{name} data", num_embeddings=num_embeddings)
    say_larger_tokenizer(trainer, num_embeddings)


def num_rows(model: Any) -> tuple[int, int]:
    """Rows of the embedding and of the output layer; ZeRO-3 may have taken the weights themselves apart."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    num_embeddings = _size(embedding, "num_embeddings")
    return num_embeddings, num_embeddings if head is None else _size(head, "out_features")


def tokenized_data(trainer: CheckedSFTTrainer) -> dict[str, tuple[Any, int]]:
    """What `_prepare_dataset` has tokenised, by name, and the rows of a batch; hands it out once."""
    data, trainer.tokenized = trainer.tokenized, {}
    args = trainer.args
    return {
        name: (
            rows,
            args.per_device_train_batch_size if name == "train" else args.per_device_eval_batch_size,
        )
        for name, rows in data.items()
    }


def refuse_padding_outside(trainer: CheckedSFTTrainer, num_embeddings: int, *, is_used: bool) -> None:
    """Raises where rows of a batch are filled up with an id that the embedding does not have."""
    pad_id = getattr(trainer.data_collator, "pad_token_id", None)
    if pad_id is None or trainer.padding_free or not is_used:
        return
    if not 0 <= pad_id < num_embeddings:
        raise ValueError(
            f"the padding token of the tokenizer: {outside('input_ids', pad_id, num_embeddings)}; "
            "or write pad_token: a token that it has"
        )


def say_larger_tokenizer(trainer: Any, num_embeddings: int) -> None:
    """Prints a line where the tokenizer has tokens that the model has not; no sample uses them."""
    tokenizer: Any = trainer.processing_class
    try:
        num_tokens = len(tokenizer)
    except TypeError:
        return
    if num_tokens > num_embeddings:
        print_once(
            f"the tokenizer has {num_tokens:,} tokens, the model's embedding {num_embeddings:,}: no "
            "sample uses those above"
        )


def _size(layer: nn.Module, name: str) -> int:
    size = getattr(layer, name, None)
    return int(size) if size is not None else int(layer.weight.shape[0])  # type: ignore[index]
