"""Writes the docs' tables, between `<!-- begin: NAME -->` and `<!-- end: NAME -->`, from docs/benchmarks.

python docs/make_docs.py            # writes
python docs/make_docs.py --check    # exit status 1 when pages are not up to date; names them
"""

from __future__ import annotations

import json
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from chunkdist.bench.figures import FIGURES, GIB, KIB, Figure, markdown, table
from chunkdist.bench.report import source, text
from chunkdist.memory.cards import CARDS

DOCS = Path(__file__).parent
RESULTS = DOCS / "benchmarks"
BASELINE = "gradient checkpointing"
Result = dict[str, Any]
FIGURES |= {
    "simulated_bytes": Figure("simulated", "{:.2f} GiB", GIB),
    "formula_error": Figure("formula off by", "{:+.1%}"),
    "bytes_over_weights": Figure("over the weights, a token", "{:.1f} KiB", KIB),
    "card": Figure("card"),
    "layers_per_group": Figure("layers a group"),
    "retained_chunks": Figure("retained"),
    "kv": Figure("K/V"),
    "offload": Figure("offload"),
    "moment": Figure("largest"),
    "predicted_s": Figure("step", "{:,.0f} s"),
    "longer_ratio": Figure("", "{:.2f} x"),
}


def result_of(name: str, folder: Path = RESULTS) -> Result:
    """The result in `{name}.json`; one of a run with `--smoke`, whose figures mean nothing, is refused."""
    result: Result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if "--smoke" in result["command"].split():
        raise ValueError(f"{name}.json is of a run with --smoke, whose figures mean nothing: delete it")
    return result


def paragraph(words: str) -> str:
    """A text, wrapped as the docs are."""
    return textwrap.fill(" ".join(words.split()), width=128, break_on_hyphens=False, break_long_words=False)


def cells(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A table with heads separated by "|"."""
    return markdown([head.split("|"), *rows])


def history(name: str, program: str) -> str:
    """Where the figures of a program are that is no longer here."""
    return paragraph(
        f"Kept in `docs/benchmarks/{name}.json`; the program that counted is in the repository's history "
        f"(`git show a94c2ba:chunkdist/bench/{program}.py`)."
    )


def with_reference(rows: Sequence[Result]) -> list[Result]:
    """The rows; the first one is what gradients are compared with."""
    return [{**rows[0], "largest_gradient_difference": None}, *rows[1:]]


def readme_figures(folder: Path = RESULTS) -> str:
    step, memory = result_of("step-cpu", folder), result_of("memory", folder)
    few, *longer = sorted({row["num_tokens"] for row in step["rows"]})
    timed = {row["variant"]: row for row in with_reference(step["rows"]) if row["num_tokens"] == few}
    for row in step["rows"]:
        if row["num_tokens"] in longer[:1]:
            timed[row["variant"]] |= {"longer_ratio": row["wall_ratio"]}
    counted = [row for row in memory["rows"] if "bytes_per_token" in row]
    lengths = " and ".join(f"{n:,}" for n in sorted({row["num_tokens"] for row in memory["rows"]}))
    rows = [{**timed.pop(row["variant"], {}), **row} for row in counted]
    rows[1:1] = timed.values()
    longest = "".join(f"{num:,} tokens" for num in longer[:1])
    columns = ("variant", "bytes_per_token", "wall_ratio", "longer_ratio", "largest_gradient_difference")
    return "\n\n".join(
        [
            table(rows, columns, variant="", wall_ratio=f"time, {few:,} tokens", longer_ratio=longest),
            paragraph(
                f"""*Memory*: what a token of the sequence adds to the peak of a step; Llama-3-8B, LoRA, bf16,
                {memory["chunk_size"]:,} tokens a chunk, between {lengths} tokens. Counted with fake tensors,
                without a GPU: `{memory["command"]}`."""
            ),
            paragraph(
                f"""*Time and gradients*, where they have been measured: forward and backward;
                {source(step)}, chunks of {step["model"]["chunk_size"]:,}, {step["model"]["dtype"]}:
                `{step["command"]}`. Differences are relative, of the worst parameter; in fp64 the tests ask
                for 1e-10."""
            ),
        ]
    )


def performance_overhead() -> str:
    result = result_of("overhead-cpu")
    rows = [
        (r["variant"], f"{r['num_cells']}", f"{r['cpu_s']:.2f} s", f"{r['host_s_per_cell'] * 1e3:.1f} ms",
         f"{r['kernel_share']:.0%}")
        for r in result["rows"]
    ]  # fmt: skip
    found = cells("|cells|CPU time of a step|outside of operators, a cell|in operators", rows)
    return f"{found}\n\n{source(result)}.\n\n{history('overhead-cpu', 'overhead')}"


def performance_python() -> str:
    row = min(result_of("overhead-cpu")["rows"], key=lambda row: row["chunk_size"])
    rows = [(whose, f"{share:.0%}") for whose, share in row["python_shares"].items()]
    return cells(f"{row['variant']} tokens, under cProfile|share", rows)


def performance_kept() -> str:
    result = result_of("step-ci")
    ratio = {row["variant"]: row["cpu_ratio"] for row in result["rows"]}
    return paragraph(
        f"""K/V kept: {ratio["chunked, K/V kept"]:.2f} of the CPU time of gradient checkpointing, rebuilt:
        {ratio["chunked, K/V rebuilt (default)"]:.2f}, attention's forward run twice (chunks of
        {result["model"]["chunk_size"]} of {result["model"]["num_tokens"]:,} tokens,
        `docs/benchmarks/step-ci.json`)."""
    )


def memory_plan() -> str:
    result = result_of("plan")
    small, large = CARDS["rtx3090"].name, CARDS["a100"].name
    schedule = ("layers_per_group", "retained_chunks", "kv", "offload", "peak_bytes", "simulated_bytes")
    after = ("formula_error", "host_bytes", "predicted_s")
    over = ("formula_error", "bytes_over_weights", "host_bytes")
    engines = ("model", "training", "num_tokens", "peak_bytes", "simulated_bytes", "formula_error", "moment")
    longest = [
        (name, *(f"{n[card]:,}" for card in ("rtx3090", "a100"))) for name, n in result["longest"].items()
    ]
    return "\n\n".join(
        [
            paragraph(
                f"""What the planner chooses for LoRA of rank 8 in bf16 on {small} (rtx3090), or, where that
                is too small, on {large} (a100), with {result["host_bytes"] / 2**30:.0f} GiB of host memory.
                *Device* is by formula, weights and optimizer included; *simulated* is the peak of the real
                code under fake tensors, without a GPU, and *formula off by* leaves out weights and optimizer
                states. Time is predicted. In these rows attention's outputs are not kept."""
            ),
            table(result["rows"], ("model", "num_tokens", "card", "chunk_size", *schedule, *after), model=""),
            cells(f"longest length|{small}|{large}", longest),
            "With as little as Llama-3-8B can do with: of the device, of the host, of the device alone.",
            table(result["targets"], ("num_tokens", *schedule, *over)),
            paragraph(
                f"""One of {result["engines"][0]["num_ranks"]} ranks of FSDP2, all layers, over the shards;
                *full* trains everything with fp32 masters and gathers bf16."""
            ),
            table(result["engines"], engines),
            history("plan", "plan"),
        ]
    )  # fmt: skip


def memory_hybrid() -> str:
    rows = [
        (
            f"{int(tokens):,}",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
            "counted" if row["counted"] else "from the growth",
            row["place"],
            f"{row['formula_bytes'] / 2**30:.2f} GiB ({row['formula_bytes'] / row['peak_bytes'] - 1:+.1%})",
        )
        for tokens, row in result_of("hybrid-memory")["summary"].items()
    ]
    return cells("tokens|peak over the weights||where|by the formula", rows)


def data_timed() -> str:
    result = result_of("long-tail-cpu")
    data, model, load = result["data"], result["model"], result["hardware"]["load_average_1_min"]
    columns = ("variant", "wall_speedup", "cpu_speedup", "tokens_padded", "tokens_recomputed")
    faster = {
        "wall_speedup": f"wall time: faster than {result['baseline']}",
        "cpu_speedup": "CPU time: the same",
    }
    words = f"""One epoch of {data["num_sequences"]} sequences, {data["num_tokens"]:,} tokens, median
    {data["median"]:.0f}, longest {data["longest"]:,}: the sample of `chunkdist.data.long_tail`, lengths
    divided by {model["divisor"]}. {source(result)}, at a load of {load} when it began, chunks of
    {model["chunk_size"]:,}, fp32; forward and backward. Where other programs ran beside it, CPU time is the
    better figure."""
    rows = table(
        with_reference(result["rows"]), (*columns, "largest_gradient_difference"), variant="", **faster
    )
    return f"{paragraph(words)}\n\n{rows}\n\n`{result['command']}`."


def data_simulated() -> str:
    rows = [
        (
            *(f"{row[key]:,}" for key in ("num_ranks", "batch_sequences", "chunk_size")),
            f"{row['num_even']} of {row['num_batches']}",
            "-" if row["largest_imbalance"] is None else f"{row['largest_imbalance']:.3f}",
            f"{row['largest_over_bound']:.3f}, {row['mean_over_bound']:.3f}",
            f"{row['mean_imbalance_of_others']:.2f}",
            *(f"{row[key]:.2%}" for key in ("empty_share", "empty_share_at_best")),
        )
        for row in result_of("long-tail-cpu")["simulation"]["rows"]
    ]
    head = "ranks|sequences of a batch|chunk size|batches without a costlier sequence|imbalance|over least"
    found = cells(f"{head}|others|empty slots|at best", rows)
    return f"{found}\n\n{history('long-tail-cpu', 'long_tail_simulation')}"


def spaco_study() -> str:
    study = result_of("spaco-study")
    errors = {(row["sampler"], row["budget"]): row for row in study["gradient_errors"]}
    by_contender: dict[tuple[str, int | None], list[Result]] = {}
    for run in study["runs"]:
        by_contender.setdefault((run["sampler"], run["budget"]), []).append(run)
    order = ["exact", *dict.fromkeys(sampler for sampler, _ in errors)]
    exact, rows = {}, []
    for sampler, budget in sorted(by_contender, key=lambda who: (who[1] or 0, order.index(who[0]))):
        runs = by_contender[sampler, budget]
        rate = min((run for run in runs if run["seed"] == 0), key=lambda run: run["loss"])["learning_rate"]
        losses = {run["seed"]: run["loss"] for run in runs if run["learning_rate"] == rate}
        exact = exact or losses
        above = [loss - exact[seed] for seed, loss in losses.items() if seed in exact]
        spread = f" ± {statistics.stdev(above) / len(above) ** 0.5:.3f}" if len(above) > 1 else ""
        loss = (f"{statistics.mean(losses.values()):.3f}", f"{statistics.mean(above):.3f}{spread}")
        rows.append(
            (
                sampler,
                f"{budget or 'all'}",
                _error(errors.pop((sampler, budget), None)),
                f"{rate:g}",
                f"{len(losses)}",
                *loss,
            )
        )
    for row in study["direct_errors"]:
        for name in ("equal", "best"):
            rows.append((f"only direct, {name}", f"{row['budget']}", f"{row[name]:.2f}", *[""] * 4))
    rows += [(sampler, f"{budget}", _error(row), *[""] * 4) for (sampler, budget), row in errors.items()]
    head = "sampler|budget|error of a gradient|learning rate|seeds|loss|above exact"
    return f"{cells(head, rows)}\n\n{history('spaco-study', 'spaco_study')}"  # fmt: skip


def _error(row: Result | None) -> str:
    return "-" if row is None else f"{row['rms_error']:.2f} ± {row['standard_error']:.2f}"


def spaco_cost() -> str:
    cost = result_of("spaco-cpu")
    rows = [row for row in cost["rows"] if "of_parts" in row]
    found = table(rows, ("variant", "of_exact", "of_parts"), variant="")
    words = f"""{source(cost)}, in {cost["model"]["num_chunks"]} chunks. A step's parts are the forward
    without gradients, and the share of the exact backward that its chunks are: `{cost["command"]}`."""
    return f"{found}\n\n{paragraph(words)}"


def pipeline_figures() -> str:
    result = result_of("pipeline")
    names = {"1f1b, equal lengths": "1F1B, equal lengths", "1f1b": "1F1B, lengths 4, 2, 1, 1"}
    example = [
        (
            names.get(row["name"], f"chunks of 2, {row['name']}"),
            f"{row['duration']:.0f}",
            f"{row['bubble_share']:.1%}",
            f"{row['bubble_share'] + row['rerun_share']:.1%}",
            "-" if row["published"] is None else f"{row['published']:.1%}",
        )
        for row in result["example"]
    ]
    tailed = [
        (
            *(f"{row[key]}" for key in ("stages", "chunk_size", "retained_chunks", "forwards_ahead")),
            *(f"{row[key]:.1%}" for key in ("largest_bubble", "mean_bubble", "rerun_share")),
            *(f"{row['peak_graphs']}", f"{row['empty_share']:.2%}"),
        )
        for row in result["long_tailed"]
    ]
    chosen = [
        (
            *(f"{row[key]:,}" for key in ("max_graph_tokens", "chunk_size")),
            *(", ".join(map(str, row[key])) for key in ("layers", "retained_chunks")),
            f"{row['forwards_ahead']}",
            *(f"{row[key]:.1%}" for key in ("largest_bubble", "mean_bubble")),
            f"{row['num_batches_above_target']} of {row['num_batches']}",
            f"{row['rerun_share']:.1%}",
        )
        for row in result["chosen"]
    ]
    alone = {
        (r["chunk_size"], r["forwards_ahead"]): r["duration"]
        for r in result["interleaved"]
        if r["stages_of_rank"] == 1
    }
    interleaved = [
        (
            *(f"{row[key]}" for key in ("stages_of_rank", "chunk_size", "forwards_ahead")),
            *(f"{row['mean_bubble']:.1%}", f"{row['peak_graphs']:.1f}"),
            f"{row['duration'] / alone[row['chunk_size'], row['forwards_ahead']]:.3f}",
        )
        for row in result["interleaved"]
    ]
    bubbles = "largest bubble|mean|"
    return "\n\n".join(
        [
            cells("|takes|bubble|bubble and reruns|published", example),
            cells(f"stages|chunk size|K|ahead|{bubbles}reruns|graphs|empty slots", tailed),
            cells(
                f"room|chunk size|layers of each stage|K of each stage|ahead|{bubbles}"
                "batches above 15 %|reruns",
                chosen,
            ),
            cells("stages of a rank|chunk size|ahead|mean bubble|graphs|time", interleaved),
            history("pipeline", "pipeline"),
        ]
    )


def sharding_figures() -> str:
    result = result_of("sharding-cpu")
    figures = ("gathers", "gathered_bytes", "reductions", "sent_bytes")
    alike: dict[tuple[Any, ...], list[str]] = {}
    for row in result["rows"]:
        key = tuple(row[name] for name in ("engine", "training", *figures))
        alike.setdefault(key, []).append(row["variant"])
    rows = [
        {**dict(zip(("engine", "training", *figures), key, strict=True)), "variant": "; ".join(names)}
        for key, names in alike.items()
    ]
    words = f"""Of one rank in one step, counted at the process group: Llama of
    {result["model"]["num_layers"]}
    layers, {result["parameter_bytes"] / 2**20:,.1f} MiB of weights, {result["num_ranks"]} ranks with
    sequences of {" and ".join(f"{n:,}" for n in result["lengths"])} tokens, in one chunk or in chunks of
    {result["chunk_size"]}. Sent: by ring algorithms, gathers and reductions together. *Leaves*: the plain
    model's
    layers are ZeRO-3's leaf modules, as those of a chunked one. Variants with the same figures share a
    row; all figures are alike on all ranks."""
    assert all(row["all_ranks_alike"] for row in result["rows"])
    found = table(rows, ("engine", "training", "variant", *figures), variant="")
    return f"{paragraph(words)}\n\n{found}\n\n`{result['command']}`."


def gpu_results(folder: Path = RESULTS) -> str:
    """All results in the folder that are of a GPU."""
    found = {
        file.stem: result_of(file.stem, folder)
        for file in sorted(folder.glob("*.json"))
        if file.stem != "pipeline-models"
    }
    parts = []
    for name, result in found.items():
        if "gpu" in result["hardware"]:
            partial = "It did not end. " if result.get("partial") else ""
            versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            parts.append(f"### {name}\n\n{text(result)}\n\n{partial}`{result['command']}`; {versions}.")
    return "\n\n".join(parts) or "Not yet measured."  # fmt: skip


BLOCKS = {
    "../README.md": {"figures": readme_figures},
    "performance.md": {
        "overhead figures": performance_overhead,
        "python figures": performance_python,
        "kept figures": performance_kept,
    },
    "memory.md": {"plan figures": memory_plan, "hybrid figures": memory_hybrid},
    "data.md": {"data figures": data_timed, "simulation figures": data_simulated},
    "spaco.md": {"study": spaco_study, "cost": spaco_cost},
    "pipeline.md": {"pipeline figures": pipeline_figures},
    "sharding.md": {"sharding figures": sharding_figures},
    "benchmarks.md": {"results": gpu_results},
}


def filled(page: str, name: str, words: str) -> str:
    """`page`, with a text between the marks of a block.

    Raises:
        ValueError: the page lacks one of them.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {begin} with {end} after it: write both where the text is to go")
    return f"{before}{begin}\n{words}\n{end}{after}"


def main(arguments: Sequence[str]) -> int:
    """Writes, or compares; returns the exit status."""
    old = []
    for name, blocks in BLOCKS.items():
        file = DOCS / name
        before = page = file.read_text(encoding="utf-8")
        for mark, made in blocks.items():
            page = filled(page, mark, made())
        if page != before:
            old.append(file.name)
            if "--check" not in arguments:
                file.write_text(page, encoding="utf-8")
    if "--check" not in arguments:
        return 0
    print("\n".join(f"{name} is not up to date: run python docs/make_docs.py" for name in old))
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
