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
LINE_COLORS = ("#999999", "#d62728", "#000000", "#1f77b4", "#7fb8e6", "#2ca02c", "#98df8a")
FIGURES |= {
    "simulated_bytes": Figure("simulated", "{:.2f} GiB", GIB),
    "formula_error": Figure("formula off by", "{:+.1%}"),
    "bytes_over_weights": Figure("over the weights, a token", "{:.1f} KiB", KIB),
    "card": Figure("card"),
    "layers_per_group": Figure("layers a group"),
    "retained_chunks": Figure("retained"),
    "kv": Figure("K/V"),
    "least": Figure("least"),
    "attention": Figure("attention's outputs"),
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


def with_reference(rows: Sequence[Result]) -> list[Result]:
    """The rows; the first one is what gradients are compared with."""
    return [{**rows[0], "largest_gradient_difference": None}, *rows[1:]]


def readme_figures(folder: Path = RESULTS) -> str:
    step, memory = result_of("step-cpu", folder), result_of("memory", folder)
    few, *longer = sorted({row["num_tokens"] for row in step["rows"]})
    step["model"]["num_tokens"] = few
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
    settings = ("chunk_size", "layers_per_group", "retained_chunks", "kv", "attention", "offload")
    schedule = (*settings, "peak_bytes", "simulated_bytes")
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
                states. Time is predicted. `{result["command"]}` counts these rows."""
            ),
            table(result["rows"], ("model", "num_tokens", "card", *schedule, *after), model=""),
            cells(f"longest length|{small}|{large}", longest),
            "Schedules of Llama-3-8B that need the least of something:",
            table(result["targets"], ("least", "num_tokens", *schedule, *over)),
            paragraph(
                f"""One of {result["engines"][0]["num_ranks"]} ranks of FSDP2, all layers, over the shards;
                *full* trains everything with fp32 masters and gathers bf16."""
            ),
            table(result["engines"], engines),
            paragraph(
                """The program that counted these ranks is in the repository's history (`git show
                a94c2ba:chunkdist/bench/plan.py`)."""
            ),
        ]
    )  # fmt: skip


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


def spaco_cost() -> str:
    cost = result_of("spaco-cpu")
    rows = [row for row in cost["rows"] if "of_parts" in row]
    found = table(rows, ("variant", "of_exact", "of_parts"), variant="")
    words = f"""{source(cost)}, in {cost["model"]["num_chunks"]} chunks. A step's parts are the forward
    without gradients, and the share of the exact backward that its chunks are: `{cost["command"]}`."""
    return f"{found}\n\n{paragraph(words)}"


def quality_runs(folder: Path = RESULTS) -> dict[tuple[str, int], dict[str, list[Result]]]:
    """The study's runs by corpus and length, and by arm: one for each seed."""
    found: dict[tuple[str, int], dict[str, list[Result]]] = {}
    for run in result_of("quality", folder)["runs"]:
        found.setdefault((run["corpus"], run["num_tokens"]), {}).setdefault(run["arm"], []).append(run)
    return found


def quality_mean(runs: Sequence[Result], name: str, share: float) -> float:
    """Over seeds, when `share` of the FLOPs are spent."""
    return statistics.mean(run["points"][round(share * len(run["points"])) - 1][name] for run in runs)


def quality_table(corpus: str) -> str:
    rows = []
    for (of, num_tokens), arms in quality_runs().items():
        for arm, runs in arms.items() if of == corpus else ():
            last = list(zip(*(run["points"][-1]["by_distance"] for run in runs), strict=True))
            recall, loss = (
                [statistics.mean(x[name] for x in seeds) for seeds in last] for name in ("recall", "loss")
            )
            rows.append(
                (
                    *(f"{num_tokens}", arm, f"{len(runs)}"),
                    *(f"{runs[0]['learning_rate']:g}", f"{runs[0]['step_to_exact']:.2f} x"),
                    *(f"{quality_mean(runs, 'recall', share):.0%}" for share in (1 / 4, 1 / 2, 1)),
                    *(", ".join(f"{x:.0%}" for x in recall), ", ".join(f"{x:.2f}" for x in loss)),
                )
            )
    head = "tokens|trained with|seeds|learning rate|FLOPs of a step|recall at 1/4|1/2|all FLOPs"
    return cells(f"{head}|recall by distance|loss by distance", rows)


def quality_words() -> str:
    result = result_of("quality")
    longer = result.get("longer") or []
    of_longer = ""
    if longer:
        of_longer = f"""Truncated with {longer[0]["times"]} times the FLOPs (*far*, {longer[0]["num_tokens"]}
        tokens) recalls {quality_mean(longer, "recall", 1):.0%}."""
    cpu_s = sum(run["cpu_s"] for name in ("tuning", "runs", "longer") for run in result.get(name, []))
    return paragraph(
        f"""Means over seeds, each of 2,048 held-out answers. {of_longer} Where 8 rows ask for the
        same records, an exact step that computes them once takes
        {result["shared"]["flops_ratio"]:.2f} of the FLOPs,
        and its loss differs by {result["shared"]["loss_difference"]:.0e}. `{result["command"]}`:
        {source(result)}, two processes, {cpu_s / 60:.0f} minutes of CPU time."""
    )


def quality_picture(folder: Path = RESULTS) -> str:
    """Recall over the FLOPs of training, as SVG: a panel a corpus and length, a line an arm."""
    parts, width, height = [], 250, 170
    panels = quality_runs(folder)
    names = list(next(iter(panels.values())))
    for number, ((corpus, num_tokens), arms) in enumerate(panels.items()):
        left, bottom = 40 + number * (width + 40), 30 + height
        parts.append(f'<path d="M{left} 30V{bottom}H{left + width}" fill="none" stroke="#888"/>')
        parts.append(f'<text x="{left}" y="20">{corpus}, {num_tokens} tokens: recall over FLOPs</text>')
        parts += [
            f'<text x="{left - 34}" y="{bottom - y * height + 4:.0f}">{y:.0%}</text>' for y in (0, 0.5, 1)
        ]
        for arm, runs in arms.items():
            num = len(runs[0]["points"])
            values = [quality_mean(runs, "recall", (i + 1) / num) for i in range(num)]
            points = " ".join(
                f"{left + (i + 1) / num * width:.0f},{bottom - y * height:.1f}" for i, y in enumerate(values)
            )
            color = LINE_COLORS[names.index(arm)]
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    for number, arm in enumerate(names):
        x, y = 40 + number % 4 * 215, 225 + number // 4 * 18
        parts.append(f'<path d="M{x} {y - 4}h20" stroke="{LINE_COLORS[number]}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 26}" y="{y}">{arm}</text>')
    size = f'width="{len(panels) * (width + 40) + 20}" height="255"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def spaco_compute() -> str:
    rows = [
        (f"{num_tokens}", arm, f"{runs[0]['step_to_exact']:.2f} x",
         *(f"{quality_mean(runs, 'loss', share):.3f}" for share in (1 / 8, 1 / 4, 1 / 2, 1)))
        for (corpus, num_tokens), arms in quality_runs().items()
        for arm, runs in arms.items()
        if corpus == "far" and (arm == "exact" or arm.startswith("SpaCO"))
    ]  # fmt: skip
    return cells("tokens|trained with|FLOPs of a step|loss at 1/8|1/4|1/2|all FLOPs", rows)


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
        "kept figures": performance_kept,
    },
    "memory.md": {"plan figures": memory_plan},
    "data.md": {"data figures": data_timed},
    "spaco.md": {"equal compute": spaco_compute, "cost": spaco_cost},
    "quality.md": {
        "far": lambda: quality_table("far"),
        "near": lambda: quality_table("near"),
        "words": quality_words,
    },
    "sharding.md": {"sharding figures": sharding_figures},
    "benchmarks.md": {"results": gpu_results},
}


PICTURES = {"figures/quality.svg": quality_picture}


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
            old.append((file, page))
    for name, picture in PICTURES.items():
        file = DOCS / name
        if not file.exists() or file.read_text(encoding="utf-8") != picture():
            old.append((file, picture()))
    if "--check" not in arguments:
        for file, words in old:
            file.parent.mkdir(exist_ok=True)
            file.write_text(words, encoding="utf-8")
        return 0
    print("\n".join(f"{file.name} is not up to date: run python docs/make_docs.py" for file, _ in old))
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
