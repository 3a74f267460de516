"""What `chunkdist plan` prints: the job, where every GiB goes, the time of a step, what more would buy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from chunkdist.config import ChunkConfig
from chunkdist.memory.cards import GIB
from chunkdist.memory.estimate import FIXED
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.optimizers import OptimizerMemory
from chunkdist.memory.planner import CONTEXT_BYTES, MARGIN_SHARE, Job, Plan, gib, longest_length, plan_step
from chunkdist.memory.sharded import Engine, HostTraffic
from chunkdist.memory.simulate import simulate
from chunkdist.train.options.arguments import TrainingOptions


def table_of_job(console: Console, job: Job, options: TrainingOptions, length: int) -> None:
    numbers = job.sizes.all_weights
    table = Table(title="chunkdist plan", title_justify="left", header_style="", show_header=False)
    rows = {
        "model": f"{options.model.model_name_or_path}, {numbers.num_numbers / 1e9:.2f}B parameters, "
        f"{numbers.num_trainable / 1e6:.1f}M trained",
        "length": f"{length:,} tokens, {job.num_rows} row(s) a micro-batch",
        "engine": f"{job.engine.name}, {job.engine.num_ranks} rank(s), {job.optimizer}"
        + _offloaded(job.engine)
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


def _offloaded(engine: Engine) -> str:
    parts = [
        name
        for name, is_there in (("weights", engine.offloads_weights), ("optimizer", engine.offloads_optimizer))
        if is_there
    ]
    return f"; {' and '.join(parts)} on the host" if parts else ""


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
    if len(estimate.host) > 1:
        table.add_row("all on the host", f"{estimate.host_bytes / GIB:.2f} of {job.host_bytes / GIB:.2f}")
    console.print(table)


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
    print_bus(console, job, plan)
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


def print_bus(console: Console, job: Job, plan: Plan) -> None:
    """What crosses the bus in a step, and what that costs."""
    traffic, time = job.engine.traffic(job.sizes, OptimizerMemory.named(job.optimizer)), plan.time
    waiting = plan.estimate.waiting_bytes
    if not (traffic.into or traffic.out or waiting):
        return
    both = (
        ("weights and gradients", traffic),
        ("what waits for the backward", HostTraffic(into=waiting, out=waiting)),
    )
    told = [
        f"{name} {gib(x.into)} to the card and {gib(x.out)} from it" for name, x in both if x.into or x.out
    ]
    console.print(f"over the bus: {'; '.join(told)}")
    copies = time.weights_s + time.host_s
    console.print(
        f"of the {time.seconds:,.1f} s, kernels take {time.compute_s:,.1f}, copies {copies:,.1f}, the "
        f"optimizer on the host {time.optimizer_s:,.1f}; with no copy beside a kernel, "
        f"{time.seconds_in_turn:,.1f} s"
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
    told = "one rank of FSDP2" if engine.name == "fsdp2" else "one rank"
    console.print(
        f"simulated ({found.num_layers_run} layers, {told}, without an optimizer): {gib(found.peak_bytes)} "
        f"over the weights; the formula says {gib(formula)} ({formula / found.peak_bytes - 1:+.1%})"
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
