"""The planner's choices for four models at five lengths, and how far the formula is from the simulated peak.

LoRA of rank 8 in bf16 on a card of 24 GiB, or, where that is too small, of 80 GB; then a rank of FSDP2. The
real code runs under fake tensors (`chunkdist.memory.simulate`); weights and optimizer states, the same for
both, are left out of the comparison.

    python -m chunkdist.bench.plan [--smoke] [--json FILE]      # twenty minutes on one core
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from chunkdist.bench.environment import provenance, write_result
from chunkdist.bench.plan_tables import CARD_NAMES, engine_table, table, target_table
from chunkdist.bench.sizes import LLAMA_3_8B
from chunkdist.config import ChunkConfig
from chunkdist.memory.cards import CARDS
from chunkdist.memory.estimate import MemoryEstimate, estimate_memory
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.planner import Job, NothingFits, Plan, longest_length, plan_step, usable_bytes
from chunkdist.memory.sharded import Engine
from chunkdist.memory.simulate import check_groups, simulate
from chunkdist.models.flops import StepFlops

LENGTHS = tuple(2**power for power in range(14, 19))
HOST_BYTES = 64 * 2**30
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {"model_type": "llama", **LLAMA_3_8B},
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen3-4B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
"""Sizes of the configs on the Hub."""
SMALL = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
}
OPTIMIZER = "adamw_torch_fused"


def plain_model(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """On the meta device."""
    values = {**settings, "use_cache": False}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def lora_model(settings: dict[str, Any]) -> Any:
    """In bf16, on the meta device."""
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.device("meta"):
        found = get_peft_model(plain_model(settings, torch.bfloat16), lora, autocast_adapter_dtype=False)
    return found.train()


TARGETS = (
    (131072, ChunkConfig(chunk_size=2048, offload="host")),
    (65536, ChunkConfig(chunk_size=2048, offload="host")),
    (32768, ChunkConfig(chunk_size=2048, layers_per_group=4, rebuild_kv=True)),
)
"""Schedules with little memory of the first model: of the device, of the host, of the device alone."""
ENGINE_JOBS = (
    ("Llama-3-8B", 65536, True),
    ("Llama-3-8B", 16384, False),
    ("Qwen3-4B", 16384, False),
)
"""A model, tokens, and whether LoRA is trained or everything."""
NUM_RANKS = 4


def target_row(model: Any, sizes: ModelSizes, config: ChunkConfig, num_tokens: int) -> dict[str, Any]:
    """By formula, and simulated."""
    estimate = estimate_memory(sizes, config, num_tokens=num_tokens, optimizer=OPTIMIZER)
    simulated = simulate(model, sizes, config, num_tokens=num_tokens)
    return {
        "num_tokens": num_tokens,
        "chunk_size": config.chunk_size,
        "layers_per_group": config.layers_per_group,
        "rebuilds_kv": config.rebuilds_kv,
        "offload": config.offload,
        "peak_bytes": estimate.peak_bytes,
        "weight_bytes": estimate.device["weights"],
        "host_bytes": estimate.host_bytes,
        "formula_step_bytes": _step_bytes(estimate),
        "simulated_step_bytes": simulated.peak_bytes,
    }


def _step_bytes(estimate: MemoryEstimate) -> int:
    """Without weights and optimizer states."""
    return estimate.step_bytes - estimate.device.get("optimizer", 0)


def engine_row(name: str, settings: dict[str, Any], num_tokens: int, lora: bool) -> dict[str, Any]:
    """One rank of FSDP2, all its layers: LoRA in bf16, or everything with fp32 masters gathered in bf16."""
    config = ChunkConfig(chunk_size=min(4096, num_tokens // 4))
    engine = Engine(name="fsdp2", num_ranks=NUM_RANKS, gathered_element_bytes=None if lora else 2)
    model = lora_model(settings) if lora else plain_model(settings, torch.float32)
    mixed = {} if lora else {"activation_bytes": 2, "weights_dtype": engine.weights_dtype}
    sizes = ModelSizes.for_config(model, config, device_type="cuda", **mixed)
    estimate = estimate_memory(sizes, config, num_tokens=num_tokens, engine=engine)
    autocast = None if lora else torch.bfloat16
    simulated = simulate(model, sizes, config, num_tokens=num_tokens, engine=engine, autocast=autocast)
    return {
        "model": name,
        "num_tokens": num_tokens,
        "training": "LoRA" if lora else "full",
        "chunk_size": config.chunk_size,
        "num_ranks": NUM_RANKS,
        "moment": estimate.moment,
        "device_bytes": estimate.device,
        "formula_step_bytes": estimate.step_bytes,
        "simulated_step_bytes": simulated.peak_bytes,
    }


def measure(
    models: dict[str, dict[str, Any]],
    lengths: Sequence[int],
    targets: Sequence[tuple[int, ChunkConfig]],
    jobs: Sequence[tuple[str, int, bool]],
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """What the JSON holds of each model: its longest lengths, and a row for each length; a row for each
    target of the first model; and of FSDP2, a row for each job.

    All are planned first, then simulated, the shortest first; `write` is called after each simulation, with
    what there is so far.
    """
    asked = ChunkConfig(chunk_size="auto", layers_per_group="auto", retained_chunks="auto", offload="auto")
    found = {name: _Planned(settings, asked, lengths) for name, settings in models.items()}
    engines: list[dict[str, Any]] = []
    first = next(iter(found.values()))
    result = {
        "host_bytes": HOST_BYTES,
        "summary": {name: one.summary for name, one in found.items()},
        "targets": [target_row(first.model, first.sizes, config, length) for length, config in targets],
        "engines": engines,
    }
    write(result)
    for length in lengths:
        for name, one in found.items():
            print(f"{name}: {length:,} tokens", file=sys.stderr, flush=True)
            if length == lengths[0] and name == next(iter(found)):
                check_groups(one.model, one.sizes, one.plans[length].config, num_tokens=length)
            simulated = simulate(one.model, one.sizes, one.plans[length].config, num_tokens=length)
            row = one.summary["lengths"][length]
            row["simulated_step_bytes"] = simulated.peak_bytes
            row["num_layers_run"] = simulated.num_layers_run
            write(result)
    for name, num_tokens, lora in jobs:
        print(f"FSDP2, {name}: {num_tokens:,} tokens", file=sys.stderr, flush=True)
        engines.append(engine_row(name, models[name], num_tokens, lora))
        write(result)
    return result


class _Planned:
    """One model's plans."""

    def __init__(self, settings: dict[str, Any], asked: ChunkConfig, lengths: Sequence[int]) -> None:
        self.model: Any = lora_model(settings)
        self.sizes = ModelSizes.for_config(self.model, asked, device_type="cuda")
        flops = StepFlops.of(self.model)
        jobs = {
            card: Job(
                sizes=self.sizes,
                flops=flops,
                card=CARDS[card],
                available_bytes=usable_bytes(CARDS[card].memory_bytes),
                host_bytes=HOST_BYTES,
                optimizer=OPTIMIZER,
            )
            for card in CARD_NAMES
        }
        found = {length: _first_that_fits(jobs, asked, length) for length in lengths}
        self.plans = {length: plan for length, (_, plan) in found.items()}
        self.summary: dict[str, Any] = {
            "model": settings,
            "longest": {card: longest_length(job, asked) for card, job in jobs.items()},
            "lengths": {length: _row(card, plan) for length, (card, plan) in found.items()},
        }


def _first_that_fits(jobs: dict[str, Job], asked: ChunkConfig, length: int) -> tuple[str, Plan]:
    *smaller, largest = jobs
    for card in smaller:
        try:
            return card, plan_step(jobs[card], asked, length)
        except NothingFits:
            continue
    return largest, plan_step(jobs[largest], asked, length)


def _row(card: str, plan: Plan) -> dict[str, Any]:
    estimate, config = plan.estimate, plan.config
    return {
        "card": card,
        "chunk_size": config.chunk_size,
        "layers_per_group": config.layers_per_group,
        "retained_chunks": config.retained_chunks,
        "rebuilds_kv": config.rebuilds_kv,
        "offload": config.offload,
        "moment": estimate.moment,
        "device_bytes": estimate.device,
        "peak_bytes": estimate.peak_bytes,
        "host_bytes": estimate.host_bytes,
        "formula_step_bytes": _step_bytes(estimate),
        "simulated_step_bytes": None,
        "predicted_s": plan.time.seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="chunkdist bench plan",
        description="The planner against the real code.",
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    options = parser.parse_args(given)
    head = {**provenance("plan", given), "method": "live bytes under FakeTensorMode; no GPU"}
    result = measure(
        SMALL if options.smoke else MODELS,
        (512, 2048) if options.smoke else LENGTHS,
        [(512, ChunkConfig(chunk_size=64, offload="host"))] if options.smoke else TARGETS,
        [("tiny", 512, True), ("tiny", 512, False)] if options.smoke else ENGINE_JOBS,
        lambda found: write_result({**head, **found}, options.json),
    )
    print(table(result))
    print(target_table(result))
    print(engine_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
