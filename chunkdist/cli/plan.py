"""`chunkdist plan`: where every GiB of a training run goes, before there is a GPU or a weight.

The model is made from its config on the meta device; what is printed follows from `chunkdist.memory`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import get_peft_config

from chunkdist.cli.plan_engine import planned_engine
from chunkdist.cli.plan_options import PlanOptions
from chunkdist.cli.plan_pipeline import run_pipeline_plan
from chunkdist.cli.plan_report import (
    all_auto,
    print_choice,
    print_generation,
    print_simulation,
    reference_bytes,
    table_of_bytes,
    table_of_job,
)
from chunkdist.config import ChunkConfig
from chunkdist.memory.cards import GIB
from chunkdist.memory.model_sizes import ModelSizes, quantized
from chunkdist.memory.planner import (
    Job,
    NothingFits,
    Plan,
    gib,
    longest_length,
    plan_as_configured,
    plan_step,
    usable_bytes,
)
from chunkdist.memory.sharded import Engine
from chunkdist.models.flops import StepFlops
from chunkdist.train.model import with_context
from chunkdist.train.options.arguments import TrainingOptions
from chunkdist.train.options.combinations import check_options
from chunkdist.train.reports.start_table import step_sizes


def run_plan(options: TrainingOptions, asked: PlanOptions, console: Console) -> int:
    """Prints the plan; returns 0, or 1 where nothing fits.

    Raises:
        ValueError: the config has no model, no chunks or no length.
    """
    config = check_options(options, will_train=False)
    if config is None:
        raise ValueError("chunk_method=none has no chunks to plan: write seco")
    if options.training.pipeline_stages > 1:
        return run_pipeline_plan(options, config, meta_model(options), asked, console)
    settings = step_sizes(options.training)
    length = asked.length or settings.num_tokens
    if length is None:
        raise ValueError(
            "the config sets no length of a row, so there is none to plan for: write --length N"
            + (", a prompt and its completion" if options.kind == "grpo" else "")
        )
    engine = planned_engine(asked, settings.activation_bytes)
    shared = asked.sequence_parallel or options.training.sequence_parallel_size
    if engine.num_ranks % shared:
        raise ValueError(
            f"--sequence-parallel {shared} with --num-ranks {engine.num_ranks}: write a multiple of {shared}"
        )
    if asked.simulate and shared > 1:
        raise ValueError(f"--simulate runs one rank alone, not {shared} that share rows: leave it out")
    model = meta_model(options)
    if engine.name == "fsdp2" and settings.activation_bytes == 2:
        keep_in_fp32(model)
    sizes = sizes_of(model, options, config, engine)
    job = job_of(model, sizes, options, asked, engine)
    table_of_job(console, job, options, length)
    chosen, is_asked = best_plan(console, job, config, length)
    if chosen is None:
        return 1
    table_of_bytes(console, chosen, job)
    if options.kind == "grpo":
        print_generation(console, model, job, chosen, length)
    print_choice(console, job, chosen, length, is_asked=is_asked)
    if asked.simulate:
        print_simulation(console, model, job, chosen, length, settings.activation_bytes)
    return 0


def meta_model(options: TrainingOptions) -> Any:
    """The model of a run with its adapters, without weights."""
    name, given = str(options.model.model_name_or_path), options.model
    try:
        config = AutoConfig.from_pretrained(
            name, revision=given.model_revision, trust_remote_code=options.training.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={name!r} gives no config: {str(error).splitlines()[0]}"
        ) from error
    dtype = None if given.dtype in (None, "auto") else getattr(torch, str(given.dtype))
    adapters = get_peft_config(given)
    quantised = given.load_in_4bit or given.load_in_8bit
    kind: Any = AutoModelForCausalLM
    if options.kind == "reward":
        kind, config.num_labels, config.pad_token_id = AutoModelForSequenceClassification, 1, 0
    with torch.device("meta"):
        model: Any = with_context(kind.from_config(config, dtype=dtype), options)
        if adapters is not None:
            # As TRL does: adapters of quantised models, and under DeepSpeed, are in the model's dtype.
            in_fp32 = not quantised and options.training.deepspeed is None
            model = get_peft_model(model, adapters, autocast_adapter_dtype=in_fp32)
    return model.train()


def keep_in_fp32(model: Any) -> None:
    """What is trained, as Accelerate (1.15) does under FSDP2 with mixed precision, whatever `dtype` says."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def sizes_of(model: Any, options: TrainingOptions, config: ChunkConfig, engine: Engine) -> ModelSizes:
    """Sizes of the model as the run will have it on a GPU."""
    mixed = step_sizes(options.training).activation_bytes
    sizes = ModelSizes.for_config(
        model, config, device_type="cuda", activation_bytes=mixed, weights_dtype=engine.weights_dtype
    )
    if options.model.load_in_4bit or options.model.load_in_8bit:
        return quantized(
            sizes,
            num_bits=4 if options.model.load_in_4bit else 8,
            double=options.model.use_bnb_nested_quant,
        )
    return sizes


def job_of(
    model: Any, sizes: ModelSizes, options: TrainingOptions, asked: PlanOptions, engine: Engine
) -> Job:
    """What the planner is asked about."""
    settings = step_sizes(options.training)
    card = asked.planned_card
    return Job(
        sizes=sizes,
        flops=StepFlops.of(model),
        card=card,
        available_bytes=usable_bytes(card.memory_bytes) - reference_bytes(sizes, options, engine),
        host_bytes=int(asked.host_gib * GIB),
        num_rows=settings.num_rows,
        engine=engine,
        optimizer=settings.optimizer,
        num_micro_batches=settings.num_micro_batches,
        sequence_ranks=asked.sequence_parallel or options.training.sequence_parallel_size,
    )


def best_plan(console: Console, job: Job, config: ChunkConfig, length: int) -> tuple[Plan | None, bool]:
    """The configured schedule if it fits, else what the planner chooses; and whether it is the configured
    one."""
    try:
        plan = plan_step(job, config, length) if config.has_auto else plan_as_configured(job, config, length)
        if job.fits(plan.estimate):
            return plan, True
        estimate = plan.estimate
        host = f" and {gib(estimate.host_bytes)} on the host" if estimate.host_bytes else ""
        console.print(f"as configured, a step needs {gib(estimate.peak_bytes)}{host}: too much\n")
    except NothingFits as error:
        console.print(f"as configured: {error}\n")
    try:
        return plan_step(job, all_auto(config), length), False
    except NothingFits as error:
        console.print(f"nothing fits: {error}")
        longest = longest_length(job, all_auto(config))
        console.print(f"longest length that fits: {longest:,} tokens")
        return None, False
