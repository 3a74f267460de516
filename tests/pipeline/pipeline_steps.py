"""What ranks run in the tests of the pipeline."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from chunkdist import ChunkConfig, IndependentSampler, UnsupportedModelError, chunk_model
from chunkdist.engine.probe import LayerProbe
from chunkdist.memory.live_bytes import LiveBytes
from chunkdist.pipeline import stage
from chunkdist.pipeline.cell import StageCell
from chunkdist.pipeline.stage_cut import cut_stages
from chunkdist.pipeline.step import Pipeline
from chunkdist.pipeline.torch_stage import LazyBufferStage
from chunkdist.stream.stream import Chunk, Stream, cut
from tests.helpers.model_zoo import tiny_model
from tests.helpers.models import VOCAB_SIZE, norms_in_fp64, tiny_llama, with_lora
from tests.helpers.sweep import double_precision


@dataclass(frozen=True, kw_only=True)
class PipelineCase:
    lengths: tuple[int, ...]
    chunk_size: int = 8
    retained_chunks: int = 1
    retained_by_stage: tuple[int, ...] | None = None
    forwards_ahead: int = 1
    model: str = "llama"
    num_layers: int = 3
    num_steps: int = 1
    lora: bool = False
    lora_targets: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    lora_layers: tuple[int, ...] | None = None
    """Which have adapters; `None`: all."""
    tied: bool = False
    num_replicas: int = 1
    """Pipelines; each trains on every so many sequences."""
    shards_weights: bool = False
    intermediate_size: int = 48

    def __str__(self) -> str:
        """What is not as usual."""
        own = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return " ".join(f"{name} {value}" for name, value, default in own if value != default)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Of one stage, or of one process."""

    grads: dict[str, Tensor]
    loss: float


def one_process(case: PipelineCase) -> StepResult:
    """The sequences one at a time."""
    with _precision(case):
        return _one_process(case)


def _one_process(case: PipelineCase) -> StepResult:
    whole, model = _model(case)
    num_items = sum(length - 1 for length in case.lengths)
    total = 0.0
    for _ in range(case.num_steps):
        for sample in _samples(case):
            ids = sample["input_ids"][None]
            loss = whole(input_ids=ids, labels=ids, num_items_in_batch=num_items, use_cache=False).loss
            loss.backward()
            total += loss.item()
    return StepResult(grads=_grads(model), loss=total / case.num_steps)


def pipeline_step(case: PipelineCase) -> StepResult:
    """This rank's stage."""
    with _precision(case):
        pipeline, model, replica = _pipeline(case)
        for _ in range(case.num_steps):
            loss = pipeline.step(_samples(case)[replica :: case.num_replicas])
    return StepResult(grads=_grads(model), loss=loss.item())


def probed_step(case: PipelineCase) -> tuple[StepResult, int]:
    """As `pipeline_step`, of a class that is not known to be exact; how many kinds of layers were asked."""
    made: list[LayerProbe] = []

    class Noted(LayerProbe):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "LayerProbe", Noted)
        patch.setattr(stage, "needs_probe", lambda model, has_state: True)
        result = pipeline_step(case)
    (probe,) = made
    return result, len(probe.passed)


def unsupported() -> dict[str, str]:
    """What is said to models that a pipeline would compute wrongly, by what they do; on the last stage."""
    said = {}
    plants = {"tokens": _pass_tokens, "dynamic": _make_dynamic, "filler": _make_dynamic}
    for name, plant in plants.items():
        case = PipelineCase(lengths=(20,))
        pipeline, model, _ = _pipeline(case)
        plant(model)
        if pipeline.stage.is_last:
            cell = StageCell(
                stage=pipeline.stage,
                number=0,
                chunk=Chunk(0, 8),
                stream=Stream(num_tokens=20, chunks=cut(20, 8), segment_starts=((0,),)),
                stores=pipeline.stage.new_stores(Chunk(0, 20)),
                model_inputs={"position_ids": torch.arange(8)[None]},
                retained=False,
                is_last_backward=False,
                hidden=torch.randn(1, 8, 32, dtype=torch.float64),
            )
            try:
                pipeline.runs([20] if name != "filler" else [3])
                pipeline.stage.run_layers(cell)
            except UnsupportedModelError as error:
                said[name] = str(error)
    return said


def _pass_tokens(model: Any) -> None:
    def add(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cos + args[0].mean(), sin)}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(add, with_kwargs=True)


def _make_dynamic(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model.config.max_position_embeddings = 4


IGNORED: dict[str, Any] = {
    "chunk_size": "auto",
    "retained_chunks": "auto",
    "layers_per_group": 2,
    "sampler": IndependentSampler(budget=2),
    "offload": "auto",
    "rebuild_kv": True,
}
"""What a pipeline does not do, by the option that asks for it."""


def refusals() -> dict[str, str]:
    """What is said to settings that no pipeline has, by what was set."""
    config = ChunkConfig(chunk_size=8)
    hybrid = tiny_model(*HYBRIDS["delta rule"])
    two = [range(2), range(2, 3)]
    chunked = chunk_model(tiny_llama(num_layers=3), config)
    gpt2: Any = tiny_model("GPT2LMHeadModel")
    tries: dict[str, tuple[Any, ChunkConfig, list[range]]] = {
        "three stages": (tiny_llama(num_layers=3), config, [range(1), range(1, 2), range(2, 3)]),
        "other layers": (tiny_llama(num_layers=2), config, [range(2, 3), range(2, 3)]),
        "chunked": (chunked, config, two),
        "peft": (with_lora(tiny_llama(num_layers=3)), config, two),
        "learned positions": (gpt2, config, [range(1), range(1, 2)]),
        "one token": (hybrid, ChunkConfig(chunk_size=1), two),
    }
    for name, value in IGNORED.items():
        settings: dict[str, Any] = {"chunk_size": 8, name: value}
        tries[name] = tiny_llama(num_layers=3), ChunkConfig(**settings), two
    said = {}
    for name, arguments in tries.items():
        try:
            Pipeline(*arguments)
        except ValueError as error:
            said[name] = str(error)
    return said


def peak_bytes(cases: list[PipelineCase]) -> list[int]:
    """What this rank's stage holds at the peak of a step, beside weights."""
    peaks = []
    for case in cases:
        pipeline, model, _ = _pipeline(case)
        pipeline.step(_samples(case))
        model.zero_grad()
        with LiveBytes(exclude=model.parameters()) as live:
            pipeline.step(_samples(case))
        peaks.append(live.peak_bytes)
    return peaks


def peak_buffers(case: PipelineCase) -> int:
    """How many buffers of what this rank receives have memory at a time."""
    peaks = []
    real = LazyBufferStage._get_recv_ops

    def noted(self: Any, recv_infos: Any) -> Any:
        operations = real(self, recv_infos)
        rows = [*self.args_recv_info.values(), *self.grad_recv_info.values()]
        buffers = [info.buffer for row in rows for info in row if info.buffer is not None]
        peaks.append(sum(not buffer.is_meta for buffer in buffers))
        return operations

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LazyBufferStage, "_get_recv_ops", noted)
        pipeline, _, _ = _pipeline(case)
        pipeline.step(_samples(case))
    return max(peaks)


def _precision(case: PipelineCase) -> AbstractContextManager[None]:
    return double_precision() if case.model in HYBRIDS else nullcontext()


def _pipeline(case: PipelineCase) -> tuple[Pipeline, Any, int]:
    """This rank's stage, its model, and the number of its replica."""
    _, model = _model(case)
    config = ChunkConfig(chunk_size=case.chunk_size, retained_chunks=case.retained_chunks, attention="math")
    num_stages = distributed.get_world_size() // case.num_replicas
    mesh = init_device_mesh("cpu", (case.num_replicas, num_stages), mesh_dim_names=("replica", "stage"))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += mesh.get_local_rank("replica")  # adapters that each rank has drawn for itself
    pipeline = Pipeline(
        model,
        config,
        cut_stages([1.0] * model.config.get_text_config().num_hidden_layers, num_stages, head_cost=0.5),
        group=mesh.get_group("stage"),
        replicas=mesh["replica"] if case.num_replicas > 1 else None,
        shards_weights=case.shards_weights,
        retained_chunks=case.retained_by_stage,
        forwards_ahead=case.forwards_ahead,
    )
    torch.manual_seed(distributed.get_rank())
    return pipeline, model, mesh.get_local_rank("replica")


def _model(case: PipelineCase) -> tuple[Any, Any]:
    """The model or its PEFT wrapper, and the causal LM inside."""
    model = (
        tiny_model(*HYBRIDS[case.model])
        if case.model in HYBRIDS
        else _OTHERS[case.model]()
        if case.model in _OTHERS
        else norms_in_fp64(
            tiny_llama(
                num_layers=case.num_layers,
                tie_word_embeddings=case.tied,
                intermediate_size=case.intermediate_size,
            )
        )
    )
    whole: Any = _with_lora(model, case) if case.lora else model
    return whole, model


def _granite() -> PreTrainedModel:
    """Its decoder scales what it gets as embeddings."""
    return _from_config(GraniteConfig(**_SIZES, embedding_multiplier=3.0, logits_scaling=2.0))


def _gemma3() -> PreTrainedModel:
    """Layers differ in window and rotary embeddings, which the decoder gives them by their index."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return _from_config(Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=11, layer_types=kinds))


def _from_config(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    config._attn_implementation = "plain"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(torch.float64)
    return model.train()


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
_OTHERS = {"granite": _granite, "gemma3": _gemma3}
HYBRIDS = {
    "delta rule": ("Qwen3_5ForCausalLM", ["linear_attention", "full_attention", "linear_attention"]),
}


def _with_lora(model: Any, case: PipelineCase) -> Any:
    targets = case.lora_targets if isinstance(case.lora_targets, str) else list(case.lora_targets)
    layers = None if case.lora_layers is None else list(case.lora_layers)
    return with_lora(
        model, lora_dropout=case.lora_dropout, target_modules=targets, layers_to_transform=layers
    )


def _samples(case: PipelineCase) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, VOCAB_SIZE, (length,), generator=generator)} for length in case.lengths
    ]


def _grads(model: nn.Module) -> dict[str, Tensor]:
    """By name; where embeddings are tied, the last stage has them as the head."""
    found = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    if model.config.tie_word_embeddings and "lm_head.weight" in found:  # type: ignore[union-attr]
        found["model.embed_tokens.weight"] = found.pop("lm_head.weight")
    return found


def _whole(grad: Tensor) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad
