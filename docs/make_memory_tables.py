"""The table of docs/memory.md, from docs/benchmarks/plan.json; written by docs/make_benchmarks.py."""

from __future__ import annotations

from pathlib import Path

from tables import DOCS, RESULTS, Result, filled, required

from chunkdist.bench.plan_tables import CARD_NAMES, engine_table, table, target_table
from chunkdist.memory.cards import CARDS

PAGE = DOCS / "memory.md"


def page_of_results(page: str, folder: Path = RESULTS) -> str:
    """`page` with the table of the committed result."""
    return page_with_table(page, required("plan", folder))


def page_with_table(page: str, result: Result) -> str:
    """`page`, with what is between its marks made from the result."""
    return filled(page, "plan figures", _text(result))


def _text(result: Result) -> str:
    small, large = (CARDS[name] for name in CARD_NAMES)
    lines = [
        "What the planner chooses for LoRA of rank 8 in bf16 on "
        f"{small.name}, or, marked *, on {large.name},",
        f"with {result['host_bytes'] / 2**30:.0f} GiB of host memory. *Device* is by formula, weights and "
        "optimizer included; *simulated* is the peak of the",
        "real code under fake tensors, without a GPU, and how far the formula is off (without weights and "
        "optimizer states). Time is predicted.",
        "",
        table(result),
        "",
        "| longest length | " + " | ".join(CARDS[name].name for name in CARD_NAMES) + " |",
        "|---|" + "---|" * len(CARD_NAMES),
    ]
    for name, found in result["summary"].items():
        lines.append(f"| {name} | " + " | ".join(f"{found['longest'][card]:,}" for card in CARD_NAMES) + " |")
    lines += [
        "",
        "With as little as Llama-3-8B can do with: of the device, of the host, of the device alone.",
        "",
        target_table(result),
        "",
        "FSDP2, all layers; *full* trains everything with fp32 masters and gathers bf16.",
        "",
        engine_table(result),
    ]
    return "\n".join([*lines, "", f"`{result['command']}`."])
