"""What the options of a pipeline exclude."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chunkdist.config import ChunkConfig
from chunkdist.train.ranks import launcher_wants_fsdp, num_launched_ranks

if TYPE_CHECKING:
    from chunkdist.train.options import TrainingOptions


def check_pipeline(
    options: TrainingOptions, chunk_config: ChunkConfig | None, *, will_train: bool = True
) -> None:
    """Refuses options that a pipeline would ignore or contradict.

    Args:
        will_train: With the ranks that there are.

    Raises:
        ValueError: one of them is set, or the ranks cannot be cut into pipelines.
    """
    training, chunk, model = options.training, options.chunk, options.model
    stages = training.pipeline_stages
    if stages < 1:
        raise ValueError(f"pipeline_stages={stages}: write at least 1")
    if stages == 1:
        for name, default in (("pipeline_shard_weights", False), ("pipeline_forwards_ahead", "1")):
            if getattr(training, name) != default:
                raise ValueError(
                    f"{name}={getattr(training, name)} with pipeline_stages=1 would be ignored: write the "
                    "number of stages"
                )
        return
    ranks = num_launched_ranks() if will_train else 2 * stages
    if ranks % stages:
        raise ValueError(
            f"pipeline_stages={stages} with {ranks} rank(s): start a multiple of {stages} "
            f"(torchrun --nproc_per_node {stages})"
        )
    ahead = training.pipeline_forwards_ahead
    if ahead != "auto" and not (ahead.isdecimal() and int(ahead) >= 1):
        raise ValueError(f"pipeline_forwards_ahead={ahead}: write at least 1, or auto")
    if training.pipeline_shard_weights and ranks == stages:
        raise ValueError(
            f"pipeline_shard_weights=True with {ranks} ranks in {stages} stages: there is one replica, and "
            f"nobody to share weights with; start {2 * stages} ranks or more, or leave it out"
        )
    refused = {
        "chunk_method": chunk_config is None or chunk_config.sampler is not None,
        "layers_per_group": chunk.layers_per_group not in ("1", "all"),
        "chunk_packing": chunk.chunk_packing,
        "chunk_offload": chunk.chunk_offload != "none",
        "chunk_rebuild_kv": chunk.chunk_rebuild_kv == "true",
        "load_in_4bit": model.load_in_4bit,
        "load_in_8bit": model.load_in_8bit,
        "deepspeed": bool(training.deepspeed),
        "fsdp": bool(training.fsdp) or launcher_wants_fsdp(),
        "fp16": training.fp16,
        "fp16_full_eval": training.fp16_full_eval,
        "bf16_full_eval": training.bf16_full_eval,
        "packing": training.packing,
        "padding_free": training.padding_free,
        "eval_packing": bool(training.eval_packing),
        "pad_to_multiple_of": training.pad_to_multiple_of is not None,
        "loss_type": training.loss_type != "nll",
        "label_smoothing_factor": training.label_smoothing_factor > 0,
        "activation_offloading": training.activation_offloading,
        "torch_empty_cache_steps": training.torch_empty_cache_steps is not None,
        "optim": str(training.optim).endswith(("lomo", "adalomo")),
        "save_on_each_node": training.save_on_each_node,
        "gradient_accumulation_steps": training.gradient_accumulation_steps > 1,
        "dataloader_drop_last": training.dataloader_drop_last,
        "average_tokens_across_devices": not training.average_tokens_across_devices,
        "load_best_model_at_end": training.load_best_model_at_end,
        "auto_find_batch_size": training.auto_find_batch_size,
        "ignore_data_skip": training.ignore_data_skip,
        "torch_compile": training.torch_compile,
        "neftune_noise_alpha": training.neftune_noise_alpha is not None,
        "train_sampling_strategy": training.train_sampling_strategy not in ("random", "sequential"),
    }
    for name in (name for name, is_set in refused.items() if is_set):
        value = next((getattr(part, name) for part in (chunk, training, model) if hasattr(part, name)), None)
        raise ValueError(f"{name}={value} with pipeline_stages={stages}: {_INSTEAD.get(name, _PLAIN)}")


_PLAIN = "a pipeline has no such thing; leave it out"
_INSTEAD = {
    "chunk_method": "a pipeline backpropagates every chunk; write chunk_method: seco",
    "layers_per_group": "all layers of a stage are one group; leave it out, or write all",
    "chunk_offload": "a stage keeps K/V and inputs on its device; write none",
    "chunk_packing": "sequences share chunks anyway; leave it out",
    "packing": "sequences share chunks anyway; leave it out",
    "fsdp": "write pipeline_shard_weights: true, and launch without FSDP",
    "gradient_accumulation_steps": "a step runs all its sequences, and more of them leave a smaller bubble; "
    "write 1, and a larger per_device_train_batch_size",
    "fp16": "no stage knows when another one's gradients overflow; write bf16: true",
    "train_sampling_strategy": "write random or sequential",
}
