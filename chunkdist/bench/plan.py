"""The planner's choices for four models at five lengths, and how far the formula is from the simulated peak.

LoRA of rank 8 in bf16 on a card of 24 GiB, or, where that is too small, of 80 GB. The real code runs under
fake tensors (`chunkdist.memory.simulate`); weights and optimizer states, the same for both, are left out of
the comparison.

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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chunkdist.bench.environment import LLAMA_3_8B, provenance, write_result
from chunkdist.config import ChunkConfig
from chunkdist.flops import StepFlops
from chunkdist.memory.cards import CARDS
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.planner import Job, NothingFits, Plan, longest_length, plan_step, usable_bytes
from chunkdist.memory.simulate import check_groups, simulate

LENGTHS = tuple(2**power for power in range(14, 19))
HOST_BYTES = 64 * 2**30
CARD_NAMES = ("rtx3090", "a100")
"""The first on which it fits."""
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


def lora_model(settings: dict[str, Any]) -> PreTrainedModel:
    """On the meta device."""
    values = {**settings, "use_cache": False}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        found: Any = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return found.train()  # type: ignore[no-any-return]


def measure(
    models: dict[str, dict[str, Any]], lengths: Sequence[int], write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """What the JSON holds of each model: its longest lengths, and a row for each length.

    All are planned first, then simulated, the shortest first; `write` is called after each simulation, with
    what there is so far.
    """
    asked = ChunkConfig(chunk_size="auto", layers_per_group="auto", retained_chunks="auto", offload="auto")
    found = {name: _Planned(settings, asked, lengths) for name, settings in models.items()}
    result = {"host_bytes": HOST_BYTES, "summary": {name: one.summary for name, one in found.items()}}
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
    weights, optimizer = estimate.device["weights"], estimate.device["optimizer"]
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
        "formula_step_bytes": estimate.peak_bytes - weights - optimizer,
        "simulated_step_bytes": None,
        "predicted_s": plan.time.seconds,
    }


def table(result: dict[str, Any]) -> str:
    """The summary, as docs/memory.md has it."""
    gib = 2**30
    lines = [
        "| | tokens | chunks | layers a group | retained | K/V | offload | device | simulated | host "
        "| step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["summary"].items():
        for num_tokens, row in found["lengths"].items():
            formula, simulated = row["formula_step_bytes"], row["simulated_step_bytes"]
            counted = "not yet counted"
            if simulated is not None:
                fixed = row["peak_bytes"] - formula
                counted = f"{(fixed + simulated) / gib:.2f} GiB ({formula / simulated - 1:+.1%})"
            lines.append(
                f"| {name} | {int(num_tokens):,} | {row['chunk_size']:,} | {row['layers_per_group']} | "
                f"{row['retained_chunks']} | {'rebuilt' if row['rebuilds_kv'] else 'kept'} | "
                f"{row['offload']} | "
                f"{row['peak_bytes'] / gib:.2f} GiB{'' if row['card'] == CARD_NAMES[0] else ' *'} | "
                f"{counted} | {row['host_bytes'] / gib:.1f} GiB | {row['predicted_s']:,.0f} s |"
            )
    return "\n".join(lines)


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
        lambda found: write_result({**head, **found}, options.json),
    )
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
