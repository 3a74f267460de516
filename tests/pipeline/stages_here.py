"""All stages of a pipeline in one process, one cell at a time: every cut of every model, without ranks.

python -m tests.pipeline.stages_here             # all classes that are exact in chunks: some minutes
python -m tests.pipeline.stages_here NAME...     # some classes
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from chunkdist import ChunkConfig, UnsupportedModelError
from chunkdist.models.exact_classes import CLASSES, TRANSFORMERS_VERSION
from chunkdist.models.layers import find_layers
from chunkdist.pipeline.runs import pack_runs
from chunkdist.pipeline.schedule import schedule_1f1b
from chunkdist.pipeline.stage import ModelStage
from chunkdist.pipeline.step import StageCells, inputs_of
from chunkdist.stream.packed import refuse_segments
from tests.helpers.model_zoo import FIRST_PLAIN_TOKEN, VOCAB_SIZE, tiny_model
from tests.helpers.sweep import Step, difference, double_precision

FILE = Path(__file__).parents[2] / "docs" / "benchmarks" / "pipeline-models.json"
LENGTHS = (16, 9, 4)
CHUNK_SIZE = 7


def samples_of(lengths: Sequence[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(FIRST_PLAIN_TOKEN, VOCAB_SIZE, (length,), generator=generator)}
        for length in lengths
    ]


def whole_step(model: PreTrainedModel, lengths: Sequence[int] = LENGTHS) -> Step:
    """The sequences one at a time."""
    count, total = sum(length - 1 for length in lengths), 0.0
    for sample in samples_of(lengths):
        ids = sample["input_ids"][None]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss * ((ids.shape[1] - 1) / count)
        loss.backward()
        total += loss.item()
    return _step(total, [model], model)


def staged_step(
    model: PreTrainedModel,
    cut: Sequence[range],
    *,
    lengths: Sequence[int] = LENGTHS,
    chunk_size: int = CHUNK_SIZE,
    retained_chunks: int = 1,
    keep_attention: bool = False,
) -> Step:
    """Every cell goes forward through all stages, then back."""
    models = [copy.deepcopy(model) for _ in cut]
    config = ChunkConfig(chunk_size=chunk_size, attention="math", keep_attention=keep_attention)
    stages = [ModelStage(own, config, layers) for own, layers in zip(models, cut, strict=True)]
    runs = pack_runs(lengths, chunk_size, shares_chunks=not stages[0].has_state)
    refuse_segments(model, max(*lengths, *(run.num_empty for run in runs)))  # as `Pipeline.runs`
    schedule = schedule_1f1b(
        [run.num_chunks for run in runs], num_stages=len(cut), retained_chunks=retained_chunks
    )
    samples = samples_of(lengths)
    inputs = [inputs_of(run, [samples[i] for i in run.sequences], torch.device("cpu")) for run in runs]
    cells = [StageCells(stage, number, schedule, runs, inputs) for number, stage in enumerate(stages)]
    for stage in stages:
        stage.begin_step()
    passed: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for kind, number in schedule.stages[-1]:
        if kind == "F":
            hidden = torch.tensor([number])
            for own in cells:
                received = hidden.detach().requires_grad_(hidden.is_floating_point())
                hidden = own(received, index=torch.tensor(number))
                passed.setdefault(number, []).append((received, hidden))
        else:
            grad = None
            for received, output in reversed(passed.pop(number)):
                output.backward(grad)
                grad = received.grad
    return _step(float(torch.stack(stages[-1].losses).sum()), models, model)


def outcomes(name: str, model: PreTrainedModel | None = None) -> list[str]:
    """By cut in two stages, and in as many as there are layers: "exact", or how it is refused or wrong."""
    with double_precision():
        model = tiny_model(name) if model is None else model
        expected, count = whole_step(model), len(find_layers(model)[2])
        cuts = [(range(border), range(border, count)) for border in range(1, count)]
        if count > 2:
            cuts.append(tuple(range(index, index + 1) for index in range(count)))
        said = []
        for cut in cuts:
            try:
                said.append(difference(expected, staged_step(model, cut)) or "exact")
            except UnsupportedModelError as error:
                said.append(f"refused: {error}")
        return said


def _step(loss: float, models: Sequence[PreTrainedModel], whole: PreTrainedModel) -> Step:
    """Gradients under the names that they have in the whole model, those of tied embeddings summed."""
    names = {id(parameter): name for name, parameter in reversed(list(whole.named_parameters()))}
    every = {name: names[id(p)] for name, p in whole.named_parameters(remove_duplicate=False)}
    grads: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                own = every[name]
                grads[own] = grads[own] + parameter.grad if own in grads else parameter.grad
                parameter.grad = None
    return Step(loss=loss, grads=grads)


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {}
    for name in sys.argv[1:] or sorted(CLASSES):
        found[name] = sorted(set(outcomes(name)))
        print(name, *found[name], sep="\n    ", flush=True)
    if not sys.argv[1:]:
        result = {"transformers": TRANSFORMERS_VERSION, "classes": found}
        FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
