"""What options exclude, said before anything is loaded: all refusals that follow from the options alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from chunkdist.config import ChunkConfig
from chunkdist.train.launch.ranks import launcher_wants_fsdp, num_launched_ranks
from chunkdist.train.options.arguments import TrainingOptions
from chunkdist.train.options.deepspeed_options import check_at_odds
from chunkdist.train.options.needed_packages import check_packages, usable_attention
from chunkdist.train.options.shared_rows import check_shared_rows
from chunkdist.train.rewards import rewards_of


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
        "chunk_share_prefixes": chunk.chunk_share_prefixes == "true",
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


def check_packing(options: TrainingOptions) -> None:
    """Refuses options that `chunk_packing` would ignore or contradict.

    Raises:
        ValueError: one of them is set.
    """
    training = options.training
    if options.chunk.chunk_method == "none":
        raise ValueError(
            "chunk_packing=True with chunk_method=none: streams of mixed length need chunks; write "
            "chunk_method: seco, or packing: true for TRL's packing"
        )
    if options.chunk.chunk_size == "auto":
        raise ValueError(
            "chunk_size=auto with chunk_packing=True: streams are assigned by their chunks before memory is "
            "looked at; write the chunk_size that `chunkdist plan` prints"
        )
    refused = {
        "packing": training.packing,
        "padding_free": training.padding_free,
        "dataloader_drop_last": training.dataloader_drop_last,
        "eval_packing": training.eval_packing,
        "ignore_data_skip": training.ignore_data_skip,
        "auto_find_batch_size": training.auto_find_batch_size,
        "pad_to_multiple_of": training.pad_to_multiple_of,
    }
    for name, value in refused.items():
        if value:
            raise ValueError(
                f"{name}={value} with chunk_packing=True: sequences are neither padded, cut, dropped nor "
                f"repeated, and evaluated one a row; leave {name} out"
            )
    if training.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={training.train_sampling_strategy} with chunk_packing=True: sequences "
            "are assigned by cost; write random or sequential"
        )
    if not training.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices=False with chunk_packing=True: ranks have different numbers of "
            "tokens, their means would not add up; write true"
        )


def check_shrinking(options: TrainingOptions, *, shards_weights: bool) -> None:
    """Raises where `oom: shrink` cannot be done.

    Args:
        shards_weights: By FSDP.

    Raises:
        ValueError: says what to write instead.
    """
    chunk, training = options.chunk, options.training
    if chunk.oom != "shrink":
        return
    for name, is_set, why in (
        ("chunk_method", chunk.chunk_method != "seco", "only exact steps are tried again; write seco"),
        ("deepspeed", bool(training.deepspeed), "DeepSpeed updates the weights before ranks can agree"),
        ("chunk_packing", chunk.chunk_packing, "streams are cut for one chunk size"),
        ("pipeline_stages", training.pipeline_stages > 1, "chunks are what stages send, of one size"),
        (
            "gradient_accumulation_steps",
            shards_weights and training.gradient_accumulation_steps > 1,
            "FSDP keeps gradients of earlier micro-batches where they cannot be thrown away; write 1",
        ),
    ):
        if is_set:
            value = getattr(chunk, name, None) or getattr(training, name, None)
            raise ValueError(f"oom=shrink with {name}={value}: {why}, or leave oom out")


def check_streaming(options: TrainingOptions) -> None:
    """Refuses what cannot be done with samples that stream.

    Raises:
        ValueError: says what to write instead.
    """
    data, mixture, training = options.data, options.mixture, options.training
    if data.dataset_name and mixture.streaming:
        raise ValueError(
            "streaming=True is an option of datasets, not of dataset_name: write dataset_streaming"
        )
    if mixture.datasets and data.dataset_streaming:
        raise ValueError(
            "dataset_streaming=True is an option of dataset_name, not of datasets: write streaming"
        )
    if not options.is_streaming:
        return
    set_by = "dataset_streaming" if data.dataset_name else "streaming"
    if training.max_steps <= 0:
        raise ValueError(
            f"{set_by}=True without max_steps: a stream does not say how long it is; write max_steps"
        )
    refused = {
        "chunk_packing": (
            options.chunk.chunk_packing,
            "write packing: true for TRL's, or chunk_packing: false",
        ),
        "pipeline_stages": (training.pipeline_stages > 1, f"write 1, or {set_by}: false"),
        "train_sampling_strategy": (
            training.train_sampling_strategy not in ("random", "sequential"),
            "leave it out, or write shuffle_dataset: true to mix what is read ahead",
        ),
        "dataloader_num_workers": (
            training.dataloader_num_workers > 1,
            "one process reads it; write 1 (beside the training) or 0",
        ),
        "test_split_size": (mixture.test_split_size is not None, f"write {set_by}: false"),
    }
    for name, (is_set, instead) in refused.items():
        if is_set:
            parts: tuple[Any, ...] = (options.chunk, training, mixture)
            value = next(getattr(part, name) for part in parts if hasattr(part, name))
            raise ValueError(
                f"{name}={value} with {set_by}=True: a stream has no length and is read in "
                f"its own order; {instead}"
            )


def check_kind(options: TrainingOptions) -> None:
    """Refuses what trainers of pairs and of rewards do not do.

    Raises:
        ValueError: says what to write instead.
    """
    training, model = options.training, options.model
    refused = {
        "chunk_packing": (options.chunk.chunk_packing, "a micro-batch's rows belong together; leave it out"),
        "oom": (options.chunk.oom == "shrink", "only SFT's steps are tried again; leave it out"),
        "dataset_streaming": (options.is_streaming, "samples are looked at before training; write false"),
        "long_samples": (
            getattr(options.data, "long_samples", "") == "split"
            or (options.kind == "reward" and options.data.long_samples == "truncate"),
            "the answer's end is what counts; write drop, or a larger max_length",
        ),
    }
    for name, (is_set, instead) in refused.items():
        if is_set:
            raise ValueError(f"{name} with {options.kind}: {instead}")
    if options.kind == "reward":
        model.lora_task_type = "SEQ_CLS"  # so that PEFT trains the score, too
    if options.kind != "grpo":
        return
    shards = bool(training.deepspeed) or bool(training.fsdp) or launcher_wants_fsdp()
    if training.beta and not model.use_peft and (model.from_scratch or shards):
        why = "it would be wrapped before it is chunked" if shards else "there are no weights to load it from"
        raise ValueError(
            f"beta={training.beta} without use_peft needs a reference model, and {why}: write beta: 0, or "
            "use_peft: true"
        )
    rewards_of(options.data.reward_funcs)


def check_options(options: TrainingOptions, *, will_train: bool = True) -> ChunkConfig | None:
    """What can be said from the options alone. Returns the chunk config.

    Args:
        will_train: False: packages that only training needs may be missing.

    Raises:
        ValueError, NotImplementedError: options exclude each other, or one would silently do harm.
    """
    chunk_config = options.chunk.chunk_config()
    training, model, data = options.training, options.model, options.data
    if training.packing and training.packing_strategy == "wrapped":
        raise ValueError(
            "packing_strategy=wrapped lets the documents of a sequence attend to each other; write bfd, "
            "which keeps "
            "them apart (and long_samples: split to cut long ones)"
        )
    if options.kind != "sft":
        check_kind(options)
    check_pipeline(options, chunk_config, will_train=will_train)
    check_shared_rows(options, chunk_config, will_train=will_train)
    is_fsdp = bool(training.fsdp) or launcher_wants_fsdp()
    if is_fsdp and training.save_only_model:
        raise ValueError(
            "save_only_model=True with FSDP2: its checkpoints hold no weights alone; write false (the "
            "trained model is saved whole at the end)"
        )
    check_shrinking(options, shards_weights=is_fsdp)
    if options.chunk.chunk_packing:
        check_packing(options)
    dataset_kwargs = training.dataset_kwargs
    if isinstance(dataset_kwargs, dict) and dataset_kwargs.get("skip_prepare_dataset"):
        raise ValueError(
            "dataset_kwargs.skip_prepare_dataset=True skips the checks of the samples; leave it out: a "
            "dataset with "
            "input_ids and labels is taken as it is"
        )
    check_streaming(options)
    output = Path(training.output_dir or ".")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir={str(output)!r} is a file: write the name of a folder")
    if not data.dataset_name and not options.mixture.datasets:
        raise ValueError(
            "dataset_name is missing: write a file, a folder, a name on the Hub, or python-stdlib"
        )
    if data.dataset_name and options.mixture.datasets:
        raise ValueError(
            "dataset_name and datasets are both set, and one would be ignored: write one of them"
        )
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is missing: write a folder or a name on the Hub")
    if model.from_scratch and (model.use_peft or model.load_in_4bit or model.load_in_8bit):
        raise ValueError(
            "from_scratch=True with use_peft or a quantised model: the base weights would be lost; drop one"
        )
    if (model.load_in_4bit or model.load_in_8bit) and not model.use_peft:
        raise ValueError(
            "load_in_4bit=True needs use_peft: true, quantised weights are not trained themselves"
        )
    is_quantised = model.load_in_4bit or model.load_in_8bit
    if will_train and is_quantised and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit=True needs bitsandbytes: pip install 'chunkdist[qlora]'")
    if will_train and training.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("use_liger_kernel=True needs Liger's kernels: pip install liger-kernel")
    check_at_odds(training)
    if will_train:
        check_packages(training)
        usable_attention(model.attn_implementation, is_chunked=chunk_config is not None)
    if will_train and training.activation_offloading and training.device.type == "cpu":
        raise ValueError(
            "activation_offloading=True without an accelerator has nowhere to take activations from: write "
            "false"
        )
    return chunk_config
