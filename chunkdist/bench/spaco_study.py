"""What SpaCO's samplers cost in loss: training runs, and the error of one gradient, beside exact gradients.

The quickstart's model (configs/models/byte-llama) learns the standard library's source files from scratch,
one sequence a step, with the quickstart's optimizer. Every sampler gets the same steps and the same number
of chunks. Each learning rate is tried with the first seed; the best one is run with the others. A run that is
in the file already is not run again, so the study can be stopped and continued.

    python -m chunkdist.bench.spaco_study --json FILE [--smoke] [--samplers NAME ...] [--seeds N]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from chunkdist import (
    ChunkConfig,
    FixedBudgetSampler,
    ImportanceSampler,
    IndependentSampler,
    RunSampler,
    chunk_model,
    unchunk_model,
)
from chunkdist.bench.environment import provenance, write_result
from chunkdist.bench.spaco_direct import direct_errors
from chunkdist.data.corpus import read_standard_library
from chunkdist.spaco.samplers import ChunkSampler

MODEL = Path(__file__).parents[2] / "configs" / "models" / "byte-llama" / "config.json"
EXACT = "exact"
PAPERS = "paper's"
SAMPLERS: dict[str, Callable[[int], ChunkSampler]] = {
    PAPERS: lambda budget: FixedBudgetSampler(budget),
    "paper's, cap 2": lambda budget: FixedBudgetSampler(budget, cap=2),
    "independent": lambda budget: IndependentSampler(budget),
    "importance": lambda budget: ImportanceSampler(budget),
    "runs of 2": lambda budget: RunSampler(budget, run_length=2, importance=False),
    "runs of 4": lambda budget: RunSampler(budget, run_length=4, importance=False),
    "runs of 2, importance": lambda budget: RunSampler(budget, run_length=2),
}
IN_TRAINING = (PAPERS, "paper's, cap 2", "independent", "importance", "runs of 2, importance")
BUDGET_DIVISORS = (16, 8, 4)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How long, how often."""

    num_tokens: int = 512
    num_chunks: int = 32
    num_steps: int = 60
    warmup_steps: int = 5
    learning_rates: tuple[float, ...] = (1.7e-4, 5e-4, 1.5e-3, 4.5e-3)
    num_seeds: int = 5
    num_held_out: int = 16
    num_draws: int = 16
    corpus_bytes: int = 1_500_000


SMOKE = Sizes(
    num_tokens=64,
    num_chunks=16,
    num_steps=1,
    warmup_steps=1,
    learning_rates=(1e-3, 3e-3),
    num_seeds=2,
    num_held_out=1,
    num_draws=2,
    corpus_bytes=200_000,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. `loss` is of held-out sequences after the last step."""

    sampler: str
    budget: int | None
    learning_rate: float
    seed: int
    loss: float
    seconds: float


class Study:
    """The model, its data, and what has been measured so far."""

    def __init__(self, sizes: Sizes, model_config: LlamaConfig) -> None:
        self.sizes = sizes
        self._model_config = model_config
        documents = read_standard_library(max_bytes=sizes.corpus_bytes)
        text = b"".join(document.text.encode() for document in documents)
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        rows = tokens[: len(tokens) // sizes.num_tokens * sizes.num_tokens].view(-1, sizes.num_tokens)
        self._held_out, self._training = rows[-sizes.num_held_out :], rows[: -sizes.num_held_out]

    def train(self, sampler: str, budget: int | None, learning_rate: float, seed: int) -> Run:
        """One run from scratch."""
        started = time.perf_counter()
        model = self.trained(sampler, budget, learning_rate, seed)
        with torch.no_grad():
            losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in self._held_out]
        return Run(
            sampler=sampler,
            budget=budget,
            learning_rate=learning_rate,
            seed=seed,
            loss=sum(losses) / len(losses),
            seconds=time.perf_counter() - started,
        )

    def trained(self, sampler: str, budget: int | None, learning_rate: float, seed: int) -> PreTrainedModel:
        """The chunked model after all steps."""
        sizes = self.sizes
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(self._model_config, dtype=torch.float32)
        model.train()
        chunk_model(model, self._chunks(sampler, budget))
        order = torch.randperm(len(self._training))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )

        def factor(step: int) -> float:
            if step < sizes.warmup_steps:
                return (step + 1) / sizes.warmup_steps
            done = (step - sizes.warmup_steps) / max(1, sizes.num_steps - sizes.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for step in range(sizes.num_steps):
            self._backward(model, self._training[order[step]])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return model

    def gradient_errors(self) -> list[dict[str, Any]]:
        """The relative rms error of one gradient of all decoder layers, by sampler and budget, after exact
        training."""
        sizes = self.sizes
        model, row = self._model_trained_exactly, self._training[-1]
        exact = self._gradient(model, row, EXACT, None)
        rows = []
        for budget in self.budgets():
            for sampler in SAMPLERS:
                torch.manual_seed(0)
                found = (self._gradient(model, row, sampler, budget) for _ in range(sizes.num_draws))
                squares = [float((one - exact).norm() / exact.norm()) ** 2 for one in found]
                error = statistics.mean(squares) ** 0.5
                spread = statistics.stdev(squares) / (2 * error * len(squares) ** 0.5)
                rows.append(
                    {"sampler": sampler, "budget": budget, "rms_error": error, "standard_error": spread}
                )
                print(f"{sampler:24} {budget:4} rms error {error:.3f}", file=sys.stderr, flush=True)
        return rows

    def direct_errors(self) -> list[dict[str, float]]:
        """Of the same gradient, were only the sum over chunks sampled: see `spaco_direct`."""
        model = self._model_trained_exactly
        unchunk_model(model)
        return direct_errors(model, self._training[-1], self.sizes.num_chunks, self.budgets())

    @functools.cached_property
    def _model_trained_exactly(self) -> PreTrainedModel:
        rates = self.sizes.learning_rates
        return self.trained(EXACT, None, rates[len(rates) // 2], 0)

    def budgets(self) -> list[int]:
        return [self.sizes.num_chunks // divisor for divisor in BUDGET_DIVISORS]

    def _gradient(self, model: PreTrainedModel, row: Tensor, sampler: str, budget: int | None) -> Tensor:
        unchunk_model(model)
        chunk_model(model, self._chunks(sampler, budget))
        model.zero_grad()
        self._backward(model, row)
        layers = model.get_decoder().layers
        return torch.cat([p.grad.flatten() for p in layers.parameters()])

    def _chunks(self, sampler: str, budget: int | None) -> ChunkConfig:
        drawn = None if budget is None else SAMPLERS[sampler](budget)
        return ChunkConfig(chunk_size=self.sizes.num_tokens // self.sizes.num_chunks, sampler=drawn)

    @staticmethod
    def _backward(model: PreTrainedModel, row: Tensor) -> None:
        model(input_ids=row[None], labels=row[None]).loss.backward()


def run_all(
    study: Study, samplers: Sequence[str], num_seeds: int, found: dict[str, Any], save: Callable[[], None]
) -> None:
    """Every run that `found` does not hold yet, cheap ones first; `save` is called after each."""
    runs = found.setdefault("runs", [])

    def run(*which: Any) -> float:
        for known in runs:
            if (known["sampler"], known["budget"], known["learning_rate"], known["seed"]) == which:
                return float(known["loss"])
        done = study.train(*which)
        print(f"{done}", file=sys.stderr, flush=True)
        runs.append(asdict(done))
        save()
        return done.loss

    if "gradient_errors" not in found:
        found["gradient_errors"] = study.gradient_errors()
        found["direct_errors"] = study.direct_errors()
        save()
    contenders = [(EXACT, None), *((name, budget) for budget in study.budgets() for name in samplers)]
    best = {
        which: min(study.sizes.learning_rates, key=lambda rate: run(*which, rate, 0)) for which in contenders
    }
    for seed in range(1, num_seeds):
        for which in contenders:
            run(*which, best[which], seed)


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """By sampler and budget: the mean loss over seeds at the best learning rate, and how far above exact."""
    runs, rows = found["runs"], []
    errors = {(row["sampler"], row["budget"]): row for row in found["gradient_errors"]}
    places = {name: place for place, name in enumerate([EXACT, *SAMPLERS])}
    contenders = {(run["sampler"], run["budget"]) for run in runs}
    for sampler, budget in sorted(contenders, key=lambda which: (which[1] or 0, places[which[0]])):
        mine = [run for run in runs if (run["sampler"], run["budget"]) == (sampler, budget)]
        rate = min((run for run in mine if run["seed"] == 0), key=lambda run: run["loss"])["learning_rate"]
        losses = {run["seed"]: run["loss"] for run in mine if run["learning_rate"] == rate}
        rows.append(
            {
                "sampler": sampler,
                "budget": budget,
                "gradient": errors.get((sampler, budget)),
                "learning_rate": rate,
                "losses": losses,
                "loss": statistics.mean(losses.values()),
            }
        )
    exact = next(row["losses"] for row in rows if row["sampler"] == EXACT)
    for row in rows:
        above = [loss - exact[seed] for seed, loss in row["losses"].items() if seed in exact]
        row["above_exact"] = statistics.mean(above)
        row["standard_error"] = statistics.stdev(above) / len(above) ** 0.5 if len(above) > 1 else None
    return rows


def table(found: dict[str, Any]) -> str:
    """The summary, for people to read."""
    lines = [
        f"{'sampler':26}{'budget':>7}{'rms error':>11}{'lr':>9}{'seeds':>7}{'loss':>9}{'above exact':>13}"
    ]
    for row in summary(found):
        error = "-" if row["gradient"] is None else f"{row['gradient']['rms_error']:.2f}"
        lines.append(
            f"{row['sampler']:26}{row['budget'] or '-':>7}{error:>11}{row['learning_rate']:9g}"
            f"{len(row['losses']):7}{row['loss']:9.4f}{row['above_exact']:13.4f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="chunkdist bench spaco-study", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--json", type=Path, metavar="FILE", required=True, help="where the figures go and come from"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, in seconds: the figures mean nothing"
    )
    parser.add_argument(
        "--samplers", nargs="+", choices=list(SAMPLERS), default=list(IN_TRAINING), help="to train with"
    )
    parser.add_argument("--seeds", type=int, help="how many; default: 5, with --smoke 2")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default: 1, cells are small")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    sizes = SMOKE if options.smoke else Sizes()
    num_seeds = sizes.num_seeds if options.seeds is None else options.seeds
    model_config = LlamaConfig(**json.loads(MODEL.read_text(encoding="utf-8")))
    found: dict[str, Any] = {
        **provenance("spaco-study", given),
        "sizes": asdict(sizes) | {"learning_rates": list(sizes.learning_rates)},
    }
    if options.json.exists():
        known = json.loads(options.json.read_text(encoding="utf-8"))
        if known["sizes"] != found["sizes"]:
            parser.error(f"{options.json} holds runs of other sizes: write another file")
        found = known

    def save() -> None:
        write_result(found, options.json)

    run_all(Study(sizes, model_config), options.samplers, num_seeds, found, save)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
