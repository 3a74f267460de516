"""Which run a checkpoint belongs to, and with which options it was trained.

A run has an id, drawn at its first start and written into `output_dir` and into each of its checkpoints,
beside the options that decide what is trained. A run that goes on has the same id and the same options; what
differs is named. Some options may differ, since they change how a run is watched, saved or placed, and not
what it trains: they are listed here. Every other option is compared, also those of later versions of
transformers.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkdist.train.checkpoints.fingerprints import folder_fingerprint

if TYPE_CHECKING:
    from chunkdist.train.options.arguments import TrainingOptions

RECORD = "chunkdist_run.json"
_STEPS = ("max_steps", "num_train_epochs")
_FREE = {
    # names and places
    *("output_dir", "run_name", "project", "resume_from_checkpoint", "local_rank", "deepspeed", "fsdp"),
    *("fsdp_config", "use_cpu", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout", "model_name_or_path", "model_revision"),
    *("trust_remote_code", "model_init_kwargs", "attn_implementation", "parallelism_config"),
    # looking, logging and saving
    *(
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_on_each_node",
        "logging_nan_inf_filter",
    ),
    *("include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "debug", "skip_memory_metrics"),
    *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only"),
    *("eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    *("include_for_metrics", "batch_eval_metrics", "eval_packing", "bf16_full_eval", "fp16_full_eval"),
    *("save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"),
    *("hub_strategy", "hub_always_push", "hub_revision", "load_best_model_at_end", "metric_for_best_model"),
    *("greater_is_better", "do_train", "do_eval", "do_predict"),
    *("restore_callback_states_from_checkpoint",),
    # how a step is computed, up to rounding
    *("tf32", "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("use_liger_kernel", "liger_kernel_config", "use_cache", "torch_empty_cache_steps"),
    *("auto_find_batch_size", "full_determinism", "activation_offloading", "ignore_data_skip"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    # compared as what they come to: the prepared samples, the batch, the order of chunk_packing
    *("dataset_num_proc", "dataset_text_field", "dataset_kwargs", "chat_template_path", "eos_token"),
    *(
        "pad_token",
        "max_length",
        "truncation_mode",
        "shuffle_dataset",
        "remove_unused_columns",
        "label_names",
    ),
    *("length_column_name", "completion_only_loss", "assistant_only_loss", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "from_scratch", "pad_to_multiple_of", "padding_free"),
    *(
        "data_seed",
        "pipeline_stages",
        "sequence_parallel_size",
        "pipeline_shard_weights",
        "pipeline_forwards_ahead",
    ),
    *_STEPS,
}
_SAMPLED = ("chunk_method", "chunk_size", "spaco_sampler", "spaco_budget", "spaco_cap")
"""Options of the chunks that are compared: an exact step is the same with any other, up to rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What `chunkdist_run.json` holds.

    Args:
        run: The id.
        options: What decides what is trained, by name.
        steps: `max_steps` and `num_train_epochs`.
        begun_from: The checkpoint of another run, or an older one, with which this run began.
        num_tokens: TRL's count when the checkpoint was saved.
    """

    run: str
    options: Mapping[str, Any]
    steps: Mapping[str, Any]
    begun_from: str | None = None
    num_tokens: float | None = None

    @staticmethod
    def of(options: TrainingOptions, num_ranks: int) -> RunRecord:
        """The record of a run that begins, before its samples are known."""
        training = options.training
        replicas = num_ranks // int(training.pipeline_stages) // int(training.sequence_parallel_size)
        found = {
            **_values(options.training),
            **_values(options.model),
            "base weights (model_name_or_path)": folder_fingerprint(
                str(options.model.model_name_or_path), options.model.model_revision
            ),
            "ranks x per_device_train_batch_size x gradient_accumulation_steps": replicas
            * training.per_device_train_batch_size
            * training.gradient_accumulation_steps,
            **{
                name: getattr(options.data, name) for name in ("reward_funcs",) if hasattr(options.data, name)
            },
            **_of_chunks(options.chunk),
            **_of_deepspeed(training),
            "data_seed (or seed)": training.seed if training.data_seed is None else training.data_seed,
        }
        steps = {name: getattr(training, name) for name in _STEPS}
        return RunRecord(run=uuid.uuid4().hex, options=_plain(found), steps=_plain(steps))

    def with_samples(self, fingerprint: str | None) -> RunRecord:
        """The record when the training samples are known."""
        name = "training samples (dataset_name, max_length, tokenizer, chat template)"
        return dataclasses.replace(self, options={**self.options, name: fingerprint})

    def going_on(self, checkpoint: Path | None, run: str | None) -> RunRecord:
        """The record of a run that begins with a checkpoint, as the run `run` or as another one."""
        if run is not None:
            return dataclasses.replace(self, run=run)
        return dataclasses.replace(
            self, begun_from=None if checkpoint is None else str(checkpoint.absolute())
        )

    def write(self, folder: Path) -> None:
        """Writes the record into a folder; what was there is replaced in one go."""
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{RECORD}"
        beside.write_text(json.dumps(dataclasses.asdict(self), indent=1, default=dict), encoding="utf-8")
        beside.replace(folder / RECORD)

    @staticmethod
    def read(folder: Path) -> RunRecord | None:
        """The record in a folder; `None`: it has none that can be read."""
        try:
            return RunRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def refuse_other_options(checkpoint: Path, record: RunRecord) -> None:
    """Compares a run with the one that has saved `checkpoint`, by the options that both know.

    Raises:
        ValueError: names what differs; steps would not be those of either run.
    """
    saved = RunRecord.read(checkpoint)
    if saved is None:
        return
    differ = [
        f"{name} was {_short(saved.options[name])} and is {_short(value)}"
        for name, value in record.options.items()
        if name in saved.options and saved.options[name] != value
    ]
    if differ:
        raise ValueError(
            f"{checkpoint} cannot go on, {'; '.join(differ)}: write what it was, or begin another run in "
            "another output_dir, without resume_from_checkpoint (model_name_or_path may be the saved model)"
        )


def changed_steps(checkpoint: Path, record: RunRecord) -> str | None:
    """What is said of a run that is to be longer or shorter than it was: its schedule is the new one."""
    saved = RunRecord.read(checkpoint)
    if saved is None:
        return None
    differ = [
        f"{name} was {saved.steps.get(name)} and is {value}"
        for name, value in record.steps.items()
        if saved.steps.get(name) != value
    ]
    if not differ:
        return None
    return f"{', '.join(differ)}: from here on the learning rate follows the schedule of the new length"


def _values(options: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(options) if field.init]
    return {name: getattr(options, name) for name in names if name not in _FREE}


def _of_chunks(chunk: Any) -> dict[str, Any]:
    if chunk.chunk_method == "spaco":
        return {name: getattr(chunk, name) for name in _SAMPLED}
    exact = {"chunk_method": "seco or none"}
    return exact | ({"chunk_size": chunk.chunk_size} if chunk.chunk_packing else {})


def _of_deepspeed(training: Any) -> dict[str, Any]:
    """The JSON's own optimizer, schedule and clipping, where it has some."""
    config = getattr(getattr(training, "hf_deepspeed_config", None), "config", None) or {}
    names = ("optimizer", "scheduler", "gradient_clipping")
    return {f"{name} of DeepSpeed's JSON": config.get(name) for name in names}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""

    def plain(value: Any) -> Any:
        return value.value if isinstance(value, Enum) else str(value)

    result: dict[str, Any] = json.loads(json.dumps(values, default=plain, sort_keys=True))
    return result


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (list, dict)) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
