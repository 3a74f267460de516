"""TRL's `SFTTrainer`, built from one set of options; bad input is refused before it trains."""

from __future__ import annotations

import copy
import netrc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer, get_dataset, get_peft_config, get_quantization_config

from chunkdist import ChunkConfig, chunk_model
from chunkdist.data.loading import is_conversational, load_splits, pick_split, sample_kind
from chunkdist.data.samples import LongSamples, fit_samples
from chunkdist.integrations.arguments import TrainingOptions, check_options
from chunkdist.integrations.checkpoints import checkpoint_to_resume, resume_line, whole_checkpoint
from chunkdist.integrations.packing import StreamTrainer
from chunkdist.integrations.stream_order import refuse_other_order
from chunkdist.sharding.launch import check_engine, check_ranks, leave_offloaded_unpinned
from chunkdist.sharding.zero3 import whole_weights

if TYPE_CHECKING:
    from datasets import Dataset


class CheckedSFTTrainer(SFTTrainer):
    """`SFTTrainer` that truncates and drops no sample unasked, and leaves no half-written checkpoint."""

    def __init__(self, *, long_samples: LongSamples, **kwargs: Any) -> None:
        self._long_samples = long_samples
        self._checkpoints: Path | None = None
        """Where checkpoints are made while one is being saved."""
        self.resumes_from: str | None = None
        """What to give to `train` as `resume_from_checkpoint`."""
        super().__init__(**kwargs)

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset:
        """TRL's preparation in two parts, the check of the samples between them.

        The first part only tokenises. The second finds `input_ids` and `labels` made, and packs; that it may
        be called with what it has made itself is TRL's own contract (its `evaluate` relies on it).
        """
        columns = set(dataset.column_names)
        is_text = not columns & {"messages", "conversations", "prompt", "labels"}  # a turn must not be cut
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        prepare = super()._prepare_dataset

        def tokenize(rows: Dataset) -> Dataset:
            return prepare(rows, processing_class, whole, False, formatting_func, dataset_name)

        tokenized = _tokenize_or_name_culprit(dataset, tokenize, dataset_name)
        kept = [
            column for column in ("input_ids", "labels", "seq_lengths") if column in tokenized.column_names
        ]
        fitting = fit_samples(
            tokenized.select_columns(kept),
            max_length=args.max_length,
            long_samples=self._long_samples,
            is_text=is_text,
            name=f"{dataset_name} data",
            keep_end=args.truncation_mode == "keep_end",
            say=print_once,
        )
        return prepare(fitting, processing_class, args, packing, None, dataset_name)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """A model without weights, which is not to be trained, stays where it is."""
        if not next(model.parameters()).is_meta:
            super()._move_model_to_device(model, device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Transformers' own, but the checkpoint has its name when it is whole, and older ones go after."""
        args = self.args
        target = Path(super()._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, push = args.save_total_limit, args.push_to_hub
        with whole_checkpoint(target, args, self.accelerator.wait_for_everyone) as folder:
            self._checkpoints, args.save_total_limit, args.push_to_hub = folder, None, False
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
            finally:
                self._checkpoints, args.save_total_limit, args.push_to_hub = None, limit, push
            if self.state.best_model_checkpoint == str(folder / target.name):
                self.state.best_model_checkpoint = str(target)
                if args.should_save:
                    self.state.save_to_json(str(folder / target.name / TRAINER_STATE_NAME))
        if push:
            self._push_from_checkpoint(str(target))
        if args.should_save:
            rotate_checkpoints(str(target.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoints or super()._get_output_dir(trial))


class ChunkSFTTrainer(StreamTrainer, CheckedSFTTrainer):
    """`CheckedSFTTrainer` on token streams, for a model chunked by `chunk_config`."""


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
        if chunk_config is not None and options.chunk.chunk_packing:
            make = partial(ChunkSFTTrainer, chunk_config=chunk_config)
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
            f"model_name_or_path={model_options.model_name_or_path!r}: {_first_line(error)}"
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
    if chunk_config is None:
        return
    fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing=True: a chunked step is its own checkpointing, both would "
            "recompute twice; "
            "write fsdp_activation_checkpointing: false"
        )
    assert trainer.model is not None
    chunk_model(trainer.model, chunk_config)


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


def print_once(line: str) -> None:
    """Prints on the first process of the whole job."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, flush=True)


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
        raise ValueError(f"model_name_or_path={name!r} gives no tokenizer: {_first_line(error)}") from error
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
        raise ValueError(f"model_name_or_path={name!r} gives no config: {_first_line(error)}") from error
    set_seed(options.training.seed)
    dtype = options.model.dtype
    with whole_weights(getattr(options.training, "hf_deepspeed_config", None)):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=None if dtype in (None, "auto") else getattr(torch, str(dtype)),
            attn_implementation=options.model.attn_implementation,
            trust_remote_code=options.training.trust_remote_code,
        )


def _tokenize_or_name_culprit(dataset: Dataset, tokenize: Callable[[Dataset], Dataset], name: str) -> Dataset:
    """`tokenize(dataset)`; if that fails, halves tell which sample is the first that fails alone."""
    try:
        return tokenize(dataset)
    except Exception as error:
        start, end, fault = 0, len(dataset), error
        while end - start > 1:
            middle = (start + end) // 2
            try:
                tokenize(dataset.select(range(start, middle)))
                start = middle
            except Exception as inner:
                end, fault = middle, inner
        try:
            tokenize(dataset.select(range(start, end)))
        except Exception as inner:
            raise ValueError(f"{name} data, sample {start}: {_first_line(inner)}") from fault
        raise


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
