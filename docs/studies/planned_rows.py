"""What the planner chooses for four models at five lengths, and how far the formula is from the simulation.

LoRA of rank 8 in bf16, on a card of 24 GiB or, where that is too small, of 80 GB. The real code runs under
fake tensors; weights and optimizer states, the same for both, are left out of the comparison.

python docs/studies/planned_rows.py    # half an hour on one core; writes docs/benchmarks/plan.json
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from chunkdist.config import ChunkConfig
from chunkdist.memory.cards import CARDS
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.planner import (
    Job,
    NothingFits,
    Plan,
    longest_length,
    plan_as_configured,
    plan_step,
    usable_bytes,
)
from chunkdist.memory.simulate import simulate
from chunkdist.models.flops import StepFlops

RESULT = Path(__file__).parents[1] / "benchmarks" / "plan.json"
AUTO = ChunkConfig(chunk_size="auto", layers_per_group="auto", retained_chunks="auto", offload="auto")
ON_HOST = ChunkConfig(chunk_size=2048, keep_attention=False, offload="host")
LEAN = {  # schedules of the first model with as little as it can do with
    "device": (131072, ON_HOST),
    "device, attention kept": (131072, replace(ON_HOST, keep_attention=True)),
    "host": (65536, ON_HOST),
    "device alone": (32768, replace(ON_HOST, offload="none", layers_per_group=4, rebuild_kv=True)),
}


def lora_model(settings: dict[str, Any]) -> Any:
    """In bf16, on the meta device."""
    config = AutoConfig.for_model(**settings, use_cache=False)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def row_of(model: Any, job: Job, plan: Plan, num_tokens: int) -> dict[str, Any]:
    """One row: by formula, and simulated."""
    config, estimate = plan.config, plan.estimate
    simulated = simulate(model, job.sizes, config, num_tokens=num_tokens).peak_bytes
    formula = estimate.step_bytes - estimate.device.get("optimizer", 0)
    return {
        "num_tokens": num_tokens,
        "chunk_size": config.chunk_size,
        "layers_per_group": config.layers_per_group,
        "retained_chunks": config.retained_chunks,
        "kv": "rebuilt" if config.rebuilds_kv else "kept",
        "attention": "kept" if config.keeps_attention else "run twice",
        "offload": config.offload,
        "peak_bytes": estimate.peak_bytes,
        "host_bytes": estimate.host_bytes,
        "simulated_bytes": estimate.peak_bytes - formula + simulated,
        "formula_error": formula / simulated - 1,
        "bytes_over_weights": (estimate.peak_bytes - estimate.device["weights"]) / num_tokens,
        "predicted_s": plan.time.seconds,
    }


def main() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    result |= {"rows": [], "targets": [], "longest": {}, "command": "python docs/studies/planned_rows.py"}
    for name, settings in result["models"].items():
        model = lora_model(settings)
        sizes, flops = ModelSizes.for_config(model, AUTO, device_type="cuda"), StepFlops.of(model)
        jobs = {
            card: Job(
                sizes=sizes,
                flops=flops,
                card=CARDS[card],
                available_bytes=usable_bytes(CARDS[card].memory_bytes),
                host_bytes=result["host_bytes"],
                optimizer="adamw_torch_fused",
            )
            for card in ("rtx3090", "a100")
        }
        result["longest"][name] = {card: longest_length(job, AUTO) for card, job in jobs.items()}
        for num_tokens in (2**power for power in range(14, 19)):
            for card, job in jobs.items():
                try:
                    plan = plan_step(job, AUTO, num_tokens)
                except NothingFits:
                    continue
                row = row_of(model, job, plan, num_tokens)
                result["rows"].append({"model": name, "card": card, **row})
                print(result["rows"][-1], flush=True)
                break
        for least, (length, config) in LEAN.items() if not result["targets"] else ():
            plan = plan_as_configured(jobs["rtx3090"], config, length)
            result["targets"].append({"least": least, **row_of(model, jobs["rtx3090"], plan, length)})
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
