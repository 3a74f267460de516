"""The tables of docs/data.md, from docs/benchmarks/long-tail-cpu.json; written by docs/make_benchmarks.py."""

from __future__ import annotations

from pathlib import Path

from tables import DOCS, RESULTS, Result, filled, paragraph, required

PAGE = DOCS / "data.md"


def page_of_results(page: str, folder: Path = RESULTS) -> str:
    """`page` with tables of the committed result."""
    return page_with_tables(page, required("long-tail-cpu", folder))


def page_with_tables(page: str, result: Result) -> str:
    """`page`, with what is between its marks made from the result."""
    return filled(page, "data figures", f"{_timed(result)}\n\n{_simulated(result['simulation'])}")


def _timed(result: Result) -> str:
    data, model, machine = result["data"], result["model"], result["hardware"]
    text = f"""One epoch of {data["num_sequences"]} sequences, {data["num_tokens"]:,} tokens, median
{data["median"]:.0f}, longest {data["longest"]:,}: the sample of `chunkdist.data.long_tail`, lengths
divided by {model["divisor"]}. Llama of {model["num_parameters"] / 1e6:.1f}M parameters in fp32, chunks of
{model["chunk_size"]:,}; forward and backward, {machine["num_threads"]} thread(s) of {machine["cpu"]} at a
load of {machine["load_average_1_min"]} when it began, {result["num_repetitions"]} round(s). Where
other programs ran beside it, CPU time is the better figure."""
    rows = [
        paragraph(text),
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
        paragraph(
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
        paragraph(text),
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
