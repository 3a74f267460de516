"""Makes the tables of docs/data.md from docs/benchmarks/long-tail-cpu.json.

python docs/make_data_tables.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

Result = dict[str, Any]
DOCS = Path(__file__).parent
PAGE, RESULT = DOCS / "data.md", DOCS / "benchmarks" / "long-tail-cpu.json"
BEGIN, END = "<!-- begin: data figures -->", "<!-- end: data figures -->"


def page_with_tables(page: str, result: Result) -> str:
    """`page`, with what is between its two marks made from the result."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the page has no {BEGIN} and {END}"
    return f"{before}{begin}\n{_timed(result)}\n\n{_simulated(result['simulation'])}\n{end}{after}"


def _timed(result: Result) -> str:
    data, model, machine = result["data"], result["model"], result["hardware"]
    text = f"""One epoch of {data["num_sequences"]} sequences, {data["num_tokens"]:,} tokens, median
{data["median"]:.0f}, longest {data["longest"]:,}: the sample of `chunkdist.data.long_tail`, lengths
divided by {model["divisor"]}. Llama of {model["num_parameters"] / 1e6:.1f}M parameters in fp32, chunks of
{model["chunk_size"]:,}; forward and backward, {machine["num_threads"]} thread(s) of {machine["cpu"]} at a
load of {machine["load_average_1_min"]} when it began, {result["num_repetitions"]} round(s). Where
other programs ran beside it, CPU time is the better figure."""
    rows = [
        _paragraph(text),
        "",
        f"| | wall time: faster than {result['baseline']} | CPU time: the same | tokens padded "
        "| tokens recomputed | gradients differ by |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["summary"].items():
        difference = row["largest_gradient_difference"]
        rows.append(
            f"| {name} | {row['wall_speedup']:.2f} x | {row['cpu_speedup']:.2f} x | "
            f"{row['tokens_padded']:,} | {row['tokens_recomputed']:,} | "
            f"{'reference' if name == result['baseline'] else f'{difference:.0e}'} |"
        )
    rows += [
        "",
        _paragraph(
            """Padded rows and TRL's packing run with Hugging Face's gradient checkpointing, all ways with the
same flash kernel and the same tiled loss. TRL's rows are as long as the longest sequence, so that it
truncates none."""
        ),
        f"`{result['command']}`.",
    ]
    return "\n".join(rows)


def _simulated(simulation: Result) -> str:
    sample = simulation["sample"]
    text = f"""Simulated with the cost of Llama-3-8B, on all of the sample: {sample["num_sequences"]:,}
sequences, {sample["share_below_4096"]:.1%} below 4,096 tokens, longest {sample["longest"]:,}, mean
{sample["mean"]:.0f} (seed {sample["seed"]}); in the last rows, on those of at most
{simulation["rows"][-1]["longest"]:,} tokens. *Imbalance*: the largest of the batches in which no single
sequence costs more than a rank's share. *Over least*: in all batches, the costliest rank over the larger
of the share and the costliest sequence, which is the least that an assignment can reach; largest and
mean. *Others*: ranks without a sequence above the share, their costliest over their mean, on average;
they wait for the others anyway. *Empty slots*: of all chunks; *at best*: no assignment within 1.05 of
the least has fewer. 4,096 sequences are assigned to 512 bins in
{simulation["assign_4096_to_512_s"]:.2f} s.
`python -m chunkdist.bench.long_tail --simulation-only --json FILE`."""
    rows = [
        _paragraph(text),
        "",
        "| ranks | sequences of a batch | chunk size | batches without a costlier sequence | imbalance "
        "| over least | others | empty slots | at best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in simulation["rows"]:
        imbalance = row["largest_imbalance"]
        rows.append(
            f"| {row['num_ranks']} | {row['batch_sequences']:,} | {row['chunk_size']:,} | "
            f"{row['num_even']} of {row['num_batches']} | "
            f"{'-' if imbalance is None else f'{imbalance:.3f}'} | {row['largest_over_bound']:.3f}, "
            f"{row['mean_over_bound']:.3f} | {row['mean_imbalance_of_others']:.2f} | "
            f"{row['empty_share']:.2%} | {row['empty_share_at_best']:.2%} |"
        )
    return "\n".join(rows)


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), width=128, break_on_hyphens=False, break_long_words=False)


def main() -> None:
    """Writes the tables."""
    PAGE.write_text(page_with_tables(PAGE.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
