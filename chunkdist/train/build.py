"""One of TRL's trainers, built from one set of options; bad input is refused before it trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch.distributed import new_subgroups
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTTrainer, get_dataset

from chunkdist import ChunkConfig, chunk_model
from chunkdist.chunking import share_rows
from chunkdist.data.completions import refuse_without_completions
from chunkdist.data.loading import (
    STDLIB_NAME,
    is_conversational,
    kind_of_columns,
    load_mixture,
    load_splits,
    pick_split,
    sample_kind,
)
from chunkdist.data.pairs import check_columns, pairs_of_texts
from chunkdist.data.sample_stream import SampleStream, checked_samples, first_sample
from chunkdist.models.extend import context_extension
from chunkdist.train.checkpoints.fingerprints import samples_fingerprint
from chunkdist.train.checkpoints.run_record import RunRecord, changed_steps, refuse_other_options
from chunkdist.train.checkpoints.trained_weights import refuse_other_weights
from chunkdist.train.checkpoints.whole import resumption_of
from chunkdist.train.launch.agreement import agreed
from chunkdist.train.launch.faults import asked_by
from chunkdist.train.launch.output import first_line, print_once
from chunkdist.train.launch.ranks import (
    UNSHARDED,
    check_engine,
    check_ranks,
    engine_name,
    leave_offloaded_unpinned,
    num_launched_ranks,
)
from chunkdist.train.launch.usable_gpu import try_first_kernel
from chunkdist.train.model import model_parts, with_context
from chunkdist.train.options.amounts import check_amounts, chunk_size_line, context_line
from chunkdist.train.options.arguments import TrainingOptions
from chunkdist.train.options.combinations import check_options
from chunkdist.train.options.needed_packages import usable_attention
from chunkdist.train.options.tokenizer_options import check_end_token
from chunkdist.train.options.wandb_mode import settle_wandb
from chunkdist.train.rewards import rewards_of
from chunkdist.train.samples.first_rows import first_rows
from chunkdist.train.samples.stream_order import refuse_other_order
from chunkdist.train.token_check import check_pair_ids, check_token_ids
from chunkdist.train.trainers.checked import CheckedSFTTrainer
from chunkdist.train.trainers.pairs import CheckedDPOTrainer, CheckedGRPOTrainer, CheckedRewardTrainer
from chunkdist.train.trainers.pipeline import PipelineSFTTrainer
from chunkdist.train.trainers.shrinking import ShrinkingTrainer
from chunkdist.train.trainers.streams import StreamTrainer
from chunkdist.train.trl_loss import install_tiled_loss

if TYPE_CHECKING:
    from datasets import IterableDataset

_OF_TRAINER = (
    "attn_implementation",
    "model_init_kwargs",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "dataset_kwargs",
    "router_aux_loss_coef",
    "report_to",
    "optim",
    "fsdp",
)
"""Options that only the trainer's constructor looks at."""


_COLUMNS = {"dpo": ("chosen", "rejected"), "reward": ("chosen", "rejected"), "grpo": ("prompt",)}


class ChunkSFTTrainer(StreamTrainer, CheckedSFTTrainer):
    """`CheckedSFTTrainer` on token streams, for a model chunked by `chunk_config`."""


class ShrinkingSFTTrainer(ShrinkingTrainer, CheckedSFTTrainer):
    """`CheckedSFTTrainer` whose steps run again with smaller chunks where memory is not enough."""


def build_trainer(options: TrainingOptions, *, has_weights: bool = True) -> tuple[Any, ChunkConfig | None]:
    """The trainer of a run, its model not yet chunked, and the config to chunk it with.

    Files and options are looked at before the model is loaded.

    Args:
        has_weights: False: the model is on the meta device, to look at what would be trained on.

    Raises:
        ValueError: something the user wrote cannot be done; nothing has been written.
        NotImplementedError: an option's value is not built yet.
    """
    chunk_config = check_options(options)
    training, model_options = options.training, options.model
    check_engine(training)
    try_first_kernel(training.device)
    resumption = agreed(lambda: resumption_of(training))
    checkpoint, record = resumption.checkpoint, RunRecord.of(options, num_launched_ranks())
    if checkpoint is not None:
        refuse_other_options(checkpoint, record)
    train_dataset, eval_dataset = _datasets(options)
    tokenizer = _tokenizer(options)
    for dataset in (train_dataset, eval_dataset):
        if dataset is not None:
            _check_template(dataset, tokenizer, options)
    if options.kind == "sft":
        check_end_token(train_dataset, tokenizer, training, name=str(model_options.model_name_or_path))
    if options.is_streaming:
        train_dataset, eval_dataset = _checked_streams(options, train_dataset, eval_dataset)
    if "wandb" in (training.report_to or []):
        settle_wandb(print_once)
    attention, line = usable_attention(model_options.attn_implementation, is_chunked=chunk_config is not None)
    model_options.attn_implementation = attention
    for said in (line, chunk_size_line(options, chunk_config)):
        if said is not None:
            print_once(said)
    if chunk_config is not None and training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = (
            False  # a group is one node of the graph, with all its parameters
        )
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # there is nothing to pin memory for, torch would warn
    parts = model_parts(options, is_chunked=chunk_config is not None, has_weights=has_weights)
    extension = context_extension(parts["model"])
    if said := context_line(options, parts["model"]):
        print_once(said)
    elif extension is not None and chunk_config is None:  # else the start table says it
        print_once(f"context of {extension.tokens:,} tokens: {extension}")
    parts |= _of_kind(options, chunk_config, parts)
    if has_weights and not model_options.from_scratch:
        training.model_init_kwargs = None  # they have been taken
    with asked_by(f"model_name_or_path={model_options.model_name_or_path!r}", *_OF_TRAINER):
        trainer = _trainer_class(options, chunk_config)(
            args=training,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **parts,
        )
    if isinstance(trainer, CheckedGRPOTrainer) and trainer.ref_model is not None:
        with_context(trainer.ref_model, options)  # TRL has loaded it by its name, as it was made
    if options.kind == "sft":
        check_token_ids(trainer)
    else:
        check_pair_ids(trainer)
    check_ranks(trainer.accelerator)
    check_amounts(trainer)
    leave_offloaded_unpinned(trainer.accelerator)
    record = record.with_samples(agreed(lambda: samples_fingerprint(trainer.train_dataset)))
    trainer.run = record.going_on(checkpoint, resumption.run)
    if checkpoint is not None:
        refuse_other_order(checkpoint, getattr(trainer, "order", None))
        refuse_other_options(checkpoint, record)
        if RunRecord.read(checkpoint) is None and engine_name(training) == UNSHARDED:
            refuse_other_weights(checkpoint, trainer.model)
        trainer.resumes_from = str(checkpoint)
    lines = [resumption.line()]
    lines += [] if checkpoint is None else [changed_steps(checkpoint, record)]
    for said in filter(None, lines):
        print_once(said)
    return trainer, chunk_config


def _trainer_class(options: TrainingOptions, chunk_config: ChunkConfig | None) -> Callable[..., Any]:
    if options.kind != "sft":
        return {"dpo": CheckedDPOTrainer, "reward": CheckedRewardTrainer, "grpo": CheckedGRPOTrainer}[
            options.kind
        ]
    if chunk_config is not None and options.training.pipeline_stages > 1:
        return partial(PipelineSFTTrainer, chunk_config=chunk_config)
    if chunk_config is not None and options.chunk.chunk_packing:
        return partial(ChunkSFTTrainer, chunk_config=chunk_config)
    return ShrinkingSFTTrainer if options.chunk.oom == "shrink" else CheckedSFTTrainer


def _of_kind(
    options: TrainingOptions, chunk_config: ChunkConfig | None, parts: dict[str, Any]
) -> dict[str, Any]:
    """What the trainers do not have in common."""
    if options.kind == "grpo":
        return {"reward_funcs": rewards_of(options.data.reward_funcs)}
    given = {"long_samples": options.data.long_samples}
    needs_reference = options.kind == "dpo" and parts["peft_config"] is None
    if needs_reference and not options.training.precompute_ref_log_probs:
        # TRL would load it where the model's weights are, and an engine may wrap it before it is chunked.
        reference = model_parts(options, is_chunked=chunk_config is not None)["model"].eval()
        given["ref_model"] = reference if chunk_config is None else chunk_model(reference, chunk_config)
    return given


def chunk_trainer(trainer: SFTTrainer, chunk_config: ChunkConfig | None) -> None:
    """Chunks the model of a trainer that has not begun to train. `None` leaves it as it is.

    Raises:
        ValueError: Accelerate was told to checkpoint activations, or the engine refuses the model.
    """
    if chunk_config is None or isinstance(trainer, PipelineSFTTrainer):
        return  # the latter cuts the model when it begins to train
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing=True: a chunked step is its own checkpointing, both would "
            "recompute twice; "
            "write fsdp_activation_checkpointing: false"
        )
    assert trainer.model is not None
    size = int(getattr(trainer.args, "sequence_parallel_size", 1))
    if size == 1:
        chunk_model(trainer.model, chunk_config)
    else:
        share_rows(trainer.model, chunk_config, new_subgroups(size)[0])
    if isinstance(trainer, CheckedSFTTrainer):
        install_tiled_loss(trainer)
    elif isinstance(trainer, CheckedGRPOTrainer) and trainer.ref_model is not None:
        chunk_model(trainer.ref_model, chunk_config)


def first_batch(trainer: SFTTrainer, min_tokens: int = 5) -> dict[str, Any]:
    """A batch of one training sample, the first of at least `min_tokens` tokens.

    Raises:
        ValueError: all are shorter.
    """
    samples: Any = trainer.train_dataset
    if not isinstance(trainer, CheckedSFTTrainer):
        return first_rows(trainer, min_tokens)
    for sample in samples.once() if isinstance(samples, SampleStream) else samples:
        if len(sample["input_ids"]) >= min_tokens:
            return cast(dict[str, Any], trainer._prepare_inputs(trainer.data_collator([sample])))
    raise ValueError(
        f"no training sample has {min_tokens} tokens to check gradients with: write chunk_check: false"
    )


def check_blocker(trainer: SFTTrainer) -> str | None:
    """Why the gradient check cannot run inside this job; `None` when it can."""
    if isinstance(trainer, PipelineSFTTrainer):
        return "no device of a pipeline holds the whole model: run `chunkdist check` in one process"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "the sharding engine has not placed the weights yet: run `chunkdist check` in one process"
    if trainer.accelerator.num_processes > 1 and not trainer.accelerator.is_main_process:
        return "the first process checks"
    return None


def held_out_split(options: TrainingOptions) -> str:
    """The name of the test split where the data has one, else of the training split."""
    splits, _ = _splits(options)
    test: str = options.data.dataset_test_split
    return test if test in splits else str(options.data.dataset_train_split)


def _splits(options: TrainingOptions) -> tuple[Any, str]:
    """All splits of the data, and how messages name it."""
    data = options.data
    name = data.dataset_name
    if not name:
        name = "datasets"
        return load_mixture(lambda: get_dataset(options.mixture), options.mixture.datasets), name
    splits = load_splits(
        name,
        data.dataset_config,
        corpus_max_bytes=data.corpus_max_bytes,
        streaming=data.dataset_streaming,
    )
    if options.kind != "sft" and name == STDLIB_NAME:
        splits = {split: pairs_of_texts(rows) for split, rows in splits.items()}
    return splits, name


def _datasets(options: TrainingOptions) -> tuple[Any, Any]:
    data = options.data
    splits, name = _splits(options)
    train = pick_split(splits, data.dataset_train_split, option="dataset_train_split", name=name)
    if options.training.eval_strategy == "no":
        return train, None
    return train, pick_split(splits, data.dataset_test_split, option="dataset_test_split", name=name)


def _tokenizer(options: TrainingOptions) -> PreTrainedTokenizerBase:
    name = options.model.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=options.model.model_revision, trust_remote_code=options.training.trust_remote_code
        )
    except Exception as error:  # of as many kinds as there are tokenizers
        raise ValueError(f"model_name_or_path={name!r} gives no tokenizer: {first_line(error)}") from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def _checked_streams(options: TrainingOptions, *streams: IterableDataset | None) -> list[Any]:
    name, text_field = options.data.dataset_name or "datasets", options.training.dataset_text_field
    return [
        None if stream is None else checked_samples(stream, text_field=text_field, name=name)
        for stream in streams
    ]


def _check_template(dataset: Any, tokenizer: PreTrainedTokenizerBase, options: TrainingOptions) -> None:
    name = options.data.dataset_name or "datasets"
    if options.kind != "sft":
        first = check_columns(dataset, _COLUMNS[options.kind], name=name)
        if isinstance(first[_COLUMNS[options.kind][0]], list) and tokenizer.chat_template is None:
            raise ValueError(
                f"{name!r} has messages, but the tokenizer of {options.model.model_name_or_path!r} has no "
                "chat template: take a model that has one"
            )
        return
    text_field = options.training.dataset_text_field
    if options.is_streaming:
        first = first_sample(dataset, name)
        kind, _ = kind_of_columns(first, text_field=text_field, name=name)
    else:
        kind = sample_kind(dataset, text_field=text_field, name=name)
        first = dataset[0]
    if options.training.completion_only_loss:
        refuse_without_completions(list(first), kind, name=name)
    if not is_conversational(first, kind):
        if options.training.assistant_only_loss:
            raise ValueError(
                f"assistant_only_loss=True needs samples of messages, {name!r} has {kind}: write false"
            )
        return
    if tokenizer.chat_template is None and options.training.chat_template_path is None:
        raise ValueError(
            f"{name!r} has messages, but the tokenizer of {options.model.model_name_or_path!r} has no chat "
            "template: "
            "write chat_template_path: a .jinja file, or a model that has one"
        )
