"""The tables of `chunkdist bench plan`, in the terminal and in docs/memory.md."""

from __future__ import annotations

from typing import Any

CARD_NAMES = ("rtx3090", "a100")
"""The first on which it fits."""


def table(result: dict[str, Any]) -> str:
    """The summary."""
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


def target_table(result: dict[str, Any]) -> str:
    """The targets."""
    gib = 2**30
    lines = [
        "| tokens | layers a group | K/V | offload | device | simulated | over the weights, a token | host |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["targets"]:
        formula, simulated = row["formula_step_bytes"], row["simulated_step_bytes"]
        peak, tokens = row["peak_bytes"], row["num_tokens"]
        lines.append(
            f"| {tokens:,} | {row['layers_per_group']} | {'rebuilt' if row['rebuilds_kv'] else 'kept'} | "
            f"{row['offload']} | {peak / gib:.2f} GiB | {(peak - formula + simulated) / gib:.2f} GiB "
            f"({formula / simulated - 1:+.1%}) | {(peak - row['weight_bytes']) / tokens / 1024:.1f} KiB | "
            f"{row['host_bytes'] / gib:.1f} GiB |"
        )
    return "\n".join(lines)


def engine_table(result: dict[str, Any]) -> str:
    """The rows of engines."""
    gib = 2**30
    num_ranks = result["engines"][0]["num_ranks"]
    lines = [
        f"| one of {num_ranks} ranks, FSDP2 | tokens | over the shards, by formula | simulated | largest |",
        "|---|---|---|---|---|",
    ]
    for row in result["engines"]:
        formula, simulated = row["formula_step_bytes"], row["simulated_step_bytes"]
        lines.append(
            f"| {row['model']}, {row['training']} | {row['num_tokens']:,} | {formula / gib:.2f} GiB | "
            f"{simulated / gib:.2f} GiB ({formula / simulated - 1:+.1%}) | {row['moment']} |"
        )
    return "\n".join(lines)
