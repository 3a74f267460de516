"""Writes docs/support.md from what the tests run: their own tables of cases.

    python docs/make_support.py            # writes
    python docs/make_support.py --check    # exit status 1 when the file is not what would be written

What somebody has run on other machines goes into docs/support-by-hand.json: a list of objects with `engine`,
`training`, `method`, `attention`, `machine` and `date`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from chunkdist.config import ATTENTION_NAMES  # noqa: E402
from tests.distributed import test_four_ranks, test_gradients, test_presets, test_resume  # noqa: E402
from tests.distributed.cases import Case  # noqa: E402
from tests.pipeline import test_gradients as test_pipelines  # noqa: E402
from tests.pipeline import test_launch_pipeline  # noqa: E402

FILE, BY_HAND = ROOT / "docs" / "support.md", ROOT / "docs" / "support-by-hand.json"
ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
PIPELINES = {"pp": "PP", "dp x pp": "DP x PP", "fsdp2 x pp": "FSDP2 x PP"}
TRAININGS, METHODS = ("full", "LoRA", "QLoRA"), ("SeCO", "SpaCO")
ATTENTIONS = ATTENTION_NAMES[1:]  # without "auto"
HEAD = """# What is known to work

Written by `docs/make_support.py` from the tests' own tables of cases
(`tests/distributed/test_support.py` compares).

- **gradients**: in CI, all parameter gradients of 2 or 4 ranks are those of one process.
- **runs**: in CI, whole runs of the launcher, resumed ones among them, have the losses and weights of one
  process, or of the run that was not interrupted.
- **by hand**: run on other machines, see [support-by-hand.json](support-by-hand.json).
- **unknown**: nobody has tried. QLoRA's and the CUDA kernels' cells wait for machines with a GPU.
- **refused**: pipelines (PP; with replicas, and with replicas that share weights: [pipeline.md](pipeline.md))
  backpropagate every chunk, and take no quantised weights. No other cell is refused as a whole.

ZeRO-3 takes groups of one layer, the others of any number; what engines refuse: [sharding.md](sharding.md).
"""


class Cell(NamedTuple):
    engine: str
    training: str
    method: str
    attention: str


def gradient_cells() -> Iterator[Cell]:
    every = test_gradients.cases((*test_gradients.FP64, *test_gradients.FP32))
    for case in (*(parameters.values[0] for parameters in every), *test_four_ranks.CASES.values()):
        assert isinstance(case, Case)
        engine = case.engine.split()[0]
        yield Cell(engine, "LoRA" if case.lora else "full", "SpaCO" if case.spaco else "SeCO", case.attention)


def run_cells() -> Iterator[Cell]:
    """The launcher chooses the attention: cpu_flash on a CPU."""
    for preset in test_presets.PRESETS:
        yield Cell(preset.split("-")[0], "full", "SeCO", "cpu_flash")
    for engine in test_resume.ENGINES:
        for training in test_resume.TRAININGS:
            yield Cell(engine, training, "SpaCO", "cpu_flash")


def pipeline_gradient_cells() -> Iterator[Cell]:
    for case in (*test_pipelines.TWO_RANKS, *test_pipelines.FOUR_RANKS):
        yield Cell(_pipeline(case.num_replicas, case.shards_weights), _training(case.lora), "SeCO", "math")


def pipeline_run_cells() -> Iterator[Cell]:
    for num_ranks, options in test_launch_pipeline.RUNS:
        num_replicas = num_ranks // options["pipeline_stages"]
        engine = _pipeline(num_replicas, options.get("pipeline_shard_weights", False))
        yield Cell(engine, _training(options.get("use_peft", False)), "SeCO", "cpu_flash")


def _pipeline(num_replicas: int, shards_weights: bool) -> str:
    return "fsdp2 x pp" if shards_weights else "dp x pp" if num_replicas > 1 else "pp"


def _training(lora: bool) -> str:
    return "LoRA" if lora else "full"


def hand_cells() -> Iterator[Cell]:
    for entry in json.loads(BY_HAND.read_text()):
        yield Cell(*(entry[name] for name in Cell._fields))


def table() -> str:
    known = {
        "gradients": {*gradient_cells(), *pipeline_gradient_cells()},
        "runs": {*run_cells(), *pipeline_run_cells()},
        "by hand": set(hand_cells()),
    }
    lines = [
        HEAD,
        f"| engine | training | method | {' | '.join(ATTENTIONS)} |",
        "|---" * (3 + len(ATTENTIONS)) + "|",
    ]
    for engine, title in {**ENGINES, **PIPELINES}.items():
        for training in TRAININGS:
            for method in METHODS:
                cells = [Cell(engine, training, method, attention) for attention in ATTENTIONS]
                if engine in PIPELINES and (training == "QLoRA" or method == "SpaCO"):
                    lines.append(f"| {title} | {training} | {method} {'| refused ' * len(ATTENTIONS)}|")
                    continue
                said = [
                    ", ".join(kind for kind, of in known.items() if cell in of) or "unknown" for cell in cells
                ]
                lines.append(f"| {title} | {training} | {method} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    text = table()
    if "--check" in sys.argv[1:]:
        return int(not FILE.exists() or FILE.read_text() != text)
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
