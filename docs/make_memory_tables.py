"""Makes the table of docs/memory.md from docs/benchmarks/plan.json.

python docs/make_memory_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chunkdist.bench.plan import CARD_NAMES, table
from chunkdist.memory.cards import CARDS

DOCS = Path(__file__).parent
PAGE, RESULT = DOCS / "memory.md", DOCS / "benchmarks" / "plan.json"
BEGIN, END = "<!-- begin: plan figures -->", "<!-- end: plan figures -->"


def page_with_table(page: str, result: dict[str, Any]) -> str:
    """`page`, with what is between its two marks made from the result."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the page has no {BEGIN} and {END}"
    return f"{before}{begin}\n{_text(result)}\n{end}{after}"


def _text(result: dict[str, Any]) -> str:
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
    return "\n".join([*lines, "", f"`{result['command']}`."])


def main() -> None:
    """Writes the table."""
    PAGE.write_text(page_with_table(PAGE.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
