"""TRL's `SFTTrainer`, built from one set of options; bad input is refused before it trains."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import SFTTrainer, get_dataset, get_peft_config, get_quantization_config

from chunkdist import ChunkConfig, chunk_model
from chunkdist.data.loading import is_conversational, load_splits, pick_split, sample_kind
from chunkdist.data.samples import LongSamples
from chunkdist.sharding.zero3 import whole_weights
from chunkdist.train.checkpoints import checkpoint_to_resume, resume_line
from chunkdist.train.options import TrainingOptions, check_options
from chunkdist.train.ranks import check_engine, check_ranks, leave_offloaded_unpinned
from chunkdist.train.stream_order import refuse_other_order
from chunkdist.train.trainers.checked import CheckedSFTTrainer, first_line, print_once
from chunkdist.train.trainers.pipeline import PipelineSFTTrainer
from chunkdist.train.trainers.shrinking import ShrinkingTrainer
from chunkdist.train.trainers.streams import StreamTrainer
from chunkdist.train.trl_loss import install_tiled_loss

if TYPE_CHECKING:
    from datasets import Dataset


class ChunkSFTTrainer(StreamTrainer, CheckedSFTTrainer):
    """`CheckedSFTTrainer` on token streams, for a model chunked by `chunk_config`."""


class ShrinkingSFTTrainer(ShrinkingTrainer, CheckedSFTTrainer):
    """`CheckedSFTTrainer` whose steps run again with smaller chunks where memory is not enough."""


def build_trainer(
    options: TrainingOptions, *, has_weights: bool = True
) -> tuple[CheckedSFTTrainer, ChunkConfig | None]:
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
    checkpoint = checkpoint_to_resume(training)
    train_dataset, eval_dataset = _datasets(options)
    tokenizer = _tokenizer(options)
    for dataset in (train_dataset, eval_dataset):
        if dataset is not None:
            _check_template(dataset, tokenizer, options)
    if "wandb" in (training.report_to or []):
        wandb_offline_without_key()
    if chunk_config is not None:
        if training.router_aux_loss_coef is None:
            training.router_aux_loss_coef = 0.0  # chunked layers hand out no router logits
        if training.ddp_find_unused_parameters is None:
            training.ddp_find_unused_parameters = (
                False  # a group is one node of the graph, with all its parameters
            )
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # there is nothing to pin memory for, torch would warn
    model: Any = model_options.model_name_or_path
    adapters, quantization = get_peft_config(model_options), get_quantization_config(model_options)
    if not has_weights:
        model_options.attn_implementation = None  # nothing will attend
        with torch.device("meta"):
            model = _model_from_scratch(options)
            model = model if adapters is None else get_peft_model(model, adapters)
        adapters = quantization = None
    elif model_options.from_scratch:
        model = _model_from_scratch(options)
    else:
        given = training.model_init_kwargs if isinstance(training.model_init_kwargs, dict) else {}
        training.model_init_kwargs = {
            "revision": model_options.model_revision,
            "attn_implementation": model_options.attn_implementation,
            "dtype": model_options.dtype,
            "device_map": None,  # the trainer places the model; "auto" might leave layers on the host unasked
            **given,
        }
    try:
        make: Callable[..., CheckedSFTTrainer] = CheckedSFTTrainer
        if options.chunk.oom == "shrink":
            make = ShrinkingSFTTrainer
        if chunk_config is not None and options.chunk.chunk_packing:
            make = partial(ChunkSFTTrainer, chunk_config=chunk_config)
        if chunk_config is not None and training.pipeline_stages > 1:
            make = partial(PipelineSFTTrainer, chunk_config=chunk_config)
        trainer = make(
            long_samples=cast(LongSamples, options.data.long_samples),
            model=model,
            args=training,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            quantization_config=quantization,
            peft_config=adapters,
        )
    except OSError as error:
        if error.errno is not None:  # of the system, not of a name that the Hub does not know
            raise
        raise ValueError(
            f"model_name_or_path={model_options.model_name_or_path!r}: {first_line(error)}"
        ) from error
    check_ranks(trainer.accelerator)
    leave_offloaded_unpinned(trainer.accelerator)
    if checkpoint is not None:
        refuse_other_order(checkpoint, getattr(trainer, "order", None))
        trainer.resumes_from = str(checkpoint)
        print_once(resume_line(checkpoint))
    return trainer, chunk_config


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
    chunk_model(trainer.model, chunk_config)
    install_tiled_loss(trainer.model, trainer.args)


def first_batch(trainer: SFTTrainer, min_tokens: int = 5) -> dict[str, Any]:
    """A batch of one training sample, the first of at least `min_tokens` tokens.

    Raises:
        ValueError: all are shorter.
    """
    samples: Any = trainer.train_dataset
    for sample in samples:
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


def wandb_offline_without_key() -> None:
    """Sets W&B to offline when it has no key, so that it never asks for one."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if name and netrc.netrc(os.path.expanduser(name)).authenticators(host):
                return
        except (OSError, netrc.NetrcParseError):
            continue
    os.environ["WANDB_MODE"] = "offline"
    print_once("W&B has no key here: the run is recorded offline, `wandb sync` sends it later")


def _datasets(options: TrainingOptions) -> tuple[Dataset, Dataset | None]:
    data = options.data
    name = data.dataset_name
    if name:
        splits = load_splits(name, data.dataset_config, corpus_max_bytes=data.corpus_max_bytes)
    else:
        name = "datasets"
        splits = dict(get_dataset(options.mixture))
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
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model_name_or_path={name!r} gives no tokenizer: {first_line(error)}") from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def _check_template(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, options: TrainingOptions) -> None:
    name = options.data.dataset_name or "datasets"
    kind = sample_kind(dataset, text_field=options.training.dataset_text_field, name=name)
    if not is_conversational(dataset, kind):
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


def _model_from_scratch(options: TrainingOptions) -> Any:
    name = str(options.model.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(
            name,
            revision=options.model.model_revision,
            trust_remote_code=options.training.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path={name!r} gives no config: {first_line(error)}") from error
    set_seed(options.training.seed)
    dtype = options.model.dtype
    with whole_weights(getattr(options.training, "hf_deepspeed_config", None)):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=None if dtype in (None, "auto") else getattr(torch, str(dtype)),
            attn_implementation=options.model.attn_implementation,
            trust_remote_code=options.training.trust_remote_code,
        )
