"""`chunkdist plan`: where every GiB of a training run goes, before there is a GPU or a weight.

The model is made from its config on the meta device; what is printed follows from `chunkdist.memory`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import get_peft_config

from chunkdist.cli.plan_options import PlanOptions
from chunkdist.cli.plan_pipeline import run_pipeline_plan
from chunkdist.config import ChunkConfig
from chunkdist.memory.cards import GIB
from chunkdist.memory.estimate import FIXED
from chunkdist.memory.model_sizes import ModelSizes, quantized
from chunkdist.memory.planner import (
    CONTEXT_BYTES,
    MARGIN_SHARE,
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
from chunkdist.memory.simulate import simulate
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
    shared = asked.sequence_parallel or options.training.sequence_parallel_size
    if asked.num_ranks % shared:
        raise ValueError(
            f"--sequence-parallel {shared} with --num-ranks {asked.num_ranks}: write a multiple of {shared}"
        )
    if asked.simulate and shared > 1:
        raise ValueError(f"--simulate runs one rank alone, not {shared} that share rows: leave it out")
    model = meta_model(options)
    engine = Engine(
        name=asked.engine, num_ranks=asked.num_ranks, gathered_element_bytes=settings.activation_bytes
    )
    sizes = sizes_of(model, options, config, engine)
    job = job_of(model, sizes, options, asked, engine)
    table_of_job(console, job, options, asked, length)
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


def reference_bytes(sizes: ModelSizes, options: TrainingOptions, engine: Engine) -> int:
    """Weights of a reference model, which stays on the device whole; with adapters it is the model without
    them."""
    training = options.training
    has_one = options.kind == "dpo" and not training.precompute_ref_log_probs
    has_one |= options.kind == "grpo" and bool(training.beta)
    if not has_one or options.model.use_peft:
        return 0
    return sizes.all_weights.whole_bytes // engine.num_ranks


def print_generation(console: Console, model: Any, job: Job, plan: Plan, length: int) -> None:
    """The other moment of a step that generates: the rows' keys and values, of all layers."""
    text: Any = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    tokens = job.num_rows * length
    cache = tokens * text.num_hidden_layers * 2 * heads * width * job.sizes.element_bytes
    fixed = sum(size for name, size in plan.estimate.device.items() if name in FIXED)
    verdict = "fits" if fixed + cache <= job.available_bytes else "is too much: fewer or shorter completions"
    console.print(
        f"while it generates: {gib(cache)} of keys and values for {job.num_rows} rows of {length:,} tokens, "
        f"beside {gib(fixed)}, {verdict}"
    )


def best_plan(console: Console, job: Job, config: ChunkConfig, length: int) -> tuple[Plan | None, bool]:
    """The configured schedule if it fits, else what the planner chooses; and whether it is the configured
    one."""
    try:
        plan = plan_step(job, config, length) if config.has_auto else plan_as_configured(job, config, length)
        if job.fits(plan.estimate):
            return plan, True
        console.print(f"as configured, a step needs {gib(plan.estimate.peak_bytes)}: too much\n")
    except NothingFits as error:
        console.print(f"as configured: {error}\n")
    try:
        return plan_step(job, all_auto(config), length), False
    except NothingFits as error:
        console.print(f"nothing fits: {error}")
        longest = longest_length(job, all_auto(config))
        console.print(f"longest length that fits: {longest:,} tokens")
        return None, False


def all_auto(config: ChunkConfig) -> ChunkConfig:
    """`config` with everything left to the planner."""
    return replace(
        config,
        chunk_size="auto",
        layers_per_group="auto",
        retained_chunks="auto",
        offload="auto",
        rebuild_kv="auto",
        keep_attention="auto",
        control_variate="auto",
    )


def table_of_job(
    console: Console, job: Job, options: TrainingOptions, asked: PlanOptions, length: int
) -> None:
    numbers = job.sizes.all_weights
    table = Table(title="chunkdist plan", title_justify="left", header_style="", show_header=False)
    rows = {
        "model": f"{options.model.model_name_or_path}, {numbers.num_numbers / 1e9:.2f}B parameters, "
        f"{numbers.num_trainable / 1e6:.1f}M trained",
        "length": f"{length:,} tokens, {job.num_rows} row(s) a micro-batch",
        "engine": f"{asked.engine}, {asked.num_ranks} rank(s), {job.optimizer}"
        + (f"; {job.sequence_ranks} share each row" if job.sequence_ranks > 1 else ""),
        "card": f"{job.card.name}, {gib(job.card.memory_bytes)}",
        "may be used": f"{gib(job.available_bytes)}: less {gib(CONTEXT_BYTES)} for CUDA and others, and a "
        f"margin of {MARGIN_SHARE:.0%} for gaps and scratch space; on the host {gib(job.host_bytes)} a rank",
    }
    if reference := reference_bytes(job.sizes, options, job.engine):
        rows["reference model"] = f"{gib(reference)}, which the run cannot use otherwise"
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)


def table_of_bytes(console: Console, plan: Plan, job: Job) -> None:
    """Where every GiB goes."""
    estimate = plan.estimate
    table = Table(title=f"memory at the peak: {estimate.moment}", title_justify="left", header_style="")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in estimate.device.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("all", f"{estimate.peak_bytes / GIB:.2f} of {job.available_bytes / GIB:.2f}")
    for name, size in estimate.host.items():
        table.add_row(name, f"{size / GIB:.2f}")
    console.print(table)


def print_choice(console: Console, job: Job, plan: Plan, length: int, *, is_asked: bool) -> None:
    config, seconds = plan.config, plan.time.seconds
    tokens = length * job.num_rows / job.sequence_ranks
    console.print(
        f"{'as configured' if is_asked else 'what would fit'}: chunk_size: {config.chunk_size}, "
        f"layers_per_group: {config.layers_per_group}, retained_chunks: {config.retained_chunks}, "
        f"chunk_rebuild_kv: {str(config.rebuilds_kv).lower()}, chunk_keep_attention: "
        f"{str(config.keeps_attention).lower()}, chunk_offload: {config.offload}"
    )
    console.print(
        f"a step takes about {seconds:,.1f} s, {tokens / seconds:,.0f} tokens/s a rank "
        "(predicted from FLOPs, bytes moved and the card's ceilings, not measured)"
    )
    if not job.sizes.is_counted:
        console.print("one cell's graph is rough: it depends on where experts send tokens")
    if not plan.estimate.is_complete:
        console.print(f"the states of {job.optimizer!r} are not known, and not counted")
    free = all_auto(config)
    now = longest_length(job, free)
    more = replace(job, available_bytes=job.available_bytes + GIB)
    console.print(
        f"longest length that fits: {now:,} tokens; with 1 GiB more: {longest_length(more, free):,}"
    )
    fastest = plan_step(job, free, length)
    faster = plan_step(more, free, length)
    console.print(
        f"fastest schedule: {fastest.time.seconds:,.1f} s (chunk_size: {fastest.config.chunk_size}, "
        f"layers_per_group: {fastest.config.layers_per_group}, retained_chunks: "
        f"{fastest.config.retained_chunks}, chunk_keep_attention: "
        f"{str(fastest.config.keeps_attention).lower()}, chunk_offload: {fastest.config.offload}); "
        f"with 1 GiB more: {faster.time.seconds:,.1f} s"
    )


def print_simulation(
    console: Console, model: Any, job: Job, plan: Plan, length: int, activation_bytes: int | None
) -> None:
    """The formula against the real code: of one rank of FSDP2; else without an engine."""
    engine = job.engine if job.engine.name == "fsdp2" else Engine()
    found = simulate(
        model,
        job.sizes,
        plan.config,
        num_tokens=length,
        num_rows=job.num_rows,
        autocast=torch.bfloat16 if activation_bytes == 2 else None,
        engine=engine,
    )
    single = replace(job, engine=engine, optimizer="sgd", num_micro_batches=1)
    formula = single.estimate(plan.config, length).step_bytes
    told = "one rank of FSDP2" if engine.num_ranks > 1 else "one rank"
    console.print(
        f"simulated ({found.num_layers_run} layers, {told}, without an optimizer): {gib(found.peak_bytes)} "
        f"over the weights; the formula says {gib(formula)} ({formula / found.peak_bytes - 1:+.1%})"
    )
