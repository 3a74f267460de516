"""Router logits of a chunked model, and the balance loss of a mixture of experts, are those of the plain
model: fp64, all parameters, routers included."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from chunkdist import ChunkConfig, IndependentSampler, chunk_model
from chunkdist.engine import router_logits
from chunkdist.recovery import recovering
from tests.helpers.model_zoo import tiny_model
from tests.helpers.models import with_lora
from tests.helpers.planted_memory import memory_for
from tests.helpers.sweep import double_precision, packed_row, padded_rows, segments
from tests.spaco.test_spaco import Fixed

FULL = ["full_attention"] * 3
KINDS: dict[str, list[str] | None] = {
    "MixtralForCausalLM": FULL,
    "Qwen3MoeForCausalLM": FULL,
    "GptOssForCausalLM": ["sliding_attention", "full_attention", "sliding_attention"],
    "DeepseekV3ForCausalLM": None,  # it has router logits, and no loss of them
}
INPUTS = {"padded": padded_rows, "packed": packed_row}
SCHEDULES = [
    pytest.param({"layers_per_group": height, **others}, id=f"group{height}-{'-'.join(others) or 'plain'}")
    for height, others in (
        (1, {}),
        (2, {"retained_chunks": 2}),
        ("all", {}),
        (1, {"offload": "host"}),
        ("all", {"offload": "host", "retained_chunks": 1}),
    )
]


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    with double_precision():
        yield


def model_of(name: str) -> PreTrainedModel:
    model = tiny_model(name, KINDS[name])
    if hasattr(model, "router_aux_loss_coef"):
        model.router_aux_loss_coef = 1.0
    return model


@lru_cache
def inputs_of(name: str) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return INPUTS[name]()


def own_loss(logits: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> Tensor:
    """A loss of router logits that no model has."""
    weight = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).reshape(-1, 1)
    return torch.stack([((x.softmax(-1) * weight).sum(0) ** 2).sum() / weight.sum() for x in logits]).sum()


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    output = model(**inputs, use_cache=False, output_router_logits=True)
    loss = output.loss
    if getattr(output, "aux_loss", None) is None:
        loss = loss + own_loss(output.router_logits, inputs)
    loss.backward()
    return {
        "loss": loss.detach(),
        "router_logits": torch.cat([x.detach() for x in output.router_logits]),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def packed_gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain model, segment by segment; the loss of the router logits is that of all of them together."""
    model.zero_grad(set_to_none=True)
    parts = segments(inputs)
    outputs = [model(**part, use_cache=False, output_router_logits=True) for part in parts]
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    by_layer = zip(*(output.router_logits for output in outputs), strict=True)
    logits = tuple(torch.cat(layer) for layer in by_layer)
    has_own = getattr(outputs[0], "aux_loss", None) is not None
    config = model.config
    total = own_loss(logits, inputs)
    if has_own:
        experts = getattr(model, "num_experts", None) or config.num_local_experts
        total = load_balancing_loss_func(logits, experts, config.num_experts_per_tok)
    for output, count in zip(outputs, counts, strict=True):
        cross_entropy = output.loss - (output.aux_loss if has_own else 0.0)
        total = total + cross_entropy * count / sum(counts)
    total.backward()
    return {
        "loss": total.detach(),
        "router_logits": torch.cat([x.detach() for x in logits]),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def plain_gradients(model: Any, inputs: str) -> dict[str, Tensor]:
    return (packed_gradients if inputs == "packed" else gradients)(model, inputs_of(inputs))


@lru_cache
def expected(name: str, inputs: str) -> dict[str, Tensor]:
    return plain_gradients(model_of(name), inputs)


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor], inputs: str) -> None:
    found, truth = dict(found), dict(truth)
    logits = found.pop("router_logits"), truth.pop("router_logits")
    if inputs == "padded":
        real = inputs_of(inputs)["attention_mask"].bool().flatten()
        logits = tuple(x.unflatten(0, (-1, len(real)))[:, real] for x in logits)
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-12)
    assert found.keys() == truth.keys()
    routers = [name for name in truth if ".gate." in name or ".router." in name]
    assert routers
    assert all(truth[name].norm() > 0 for name in routers)
    assert max(float((found[name] - x).norm() / x.norm()) for name, x in truth.items()) < 1e-10


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_balance_loss(schedule: dict[str, Any], name: str, inputs: str) -> None:
    model = chunk_model(model_of(name), ChunkConfig(chunk_size=7, attention="math", **schedule))
    assert_same(gradients(model, inputs_of(inputs)), expected(name, inputs), inputs)


def test_the_loss_counts() -> None:
    """The comparison is no comparison of what a model without the loss would give."""
    with_loss = expected("MixtralForCausalLM", "padded")["model.layers.0.mlp.gate.weight"]
    model = chunk_model(model_of("MixtralForCausalLM"), ChunkConfig(chunk_size=7))
    model(**inputs_of("padded")).loss.backward()
    assert (model.model.layers[0].mlp.gate.weight.grad - with_loss).norm() > 1e-2 * with_loss.norm()


@pytest.mark.parametrize("height", [1, "all"])
def test_with_lora(height: Any) -> None:
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["gate"]}
    plain, model = (with_lora(model_of("Qwen3MoeForCausalLM"), **targets) for _ in range(2))
    chunk_model(model, ChunkConfig(chunk_size=7, layers_per_group=height, attention="math"))
    found, truth = gradients(model, inputs_of("padded")), gradients(plain, inputs_of("padded"))
    assert any("lora_A" in name for name in truth)
    assert_same(found, truth, "padded")


@pytest.mark.parametrize("height", [1, 2])
def test_in_evaluation_and_with_hidden_states(height: Any) -> None:
    asked = {"output_router_logits": True, "output_hidden_states": True, "use_cache": False}
    inputs = inputs_of("padded")
    with torch.no_grad():
        truth = model_of("MixtralForCausalLM")(**inputs, **asked)
        model = chunk_model(
            model_of("MixtralForCausalLM"), ChunkConfig(chunk_size=7, layers_per_group=height)
        )
        found = model(**inputs, **asked)
    assert len(found.router_logits) == 3
    assert len(found.hidden_states) == 4
    torch.testing.assert_close(found.aux_loss, truth.aux_loss)


def test_a_loss_of_padding_is_refused() -> None:
    model = chunk_model(model_of("MixtralForCausalLM"), ChunkConfig(chunk_size=7))
    output = model(**inputs_of("padded"), output_router_logits=True)
    with pytest.raises(ValueError, match="logits of padding"):
        (output.loss + output.router_logits[1].square().sum()).backward()


def test_the_mean_over_samples_of_chunks() -> None:
    """A dropped chunk's router logits count no more than its output: their gradient is unbiased."""
    name, inputs = "MixtralForCausalLM", inputs_of("packed")
    truth = expected(name, "packed")
    mean = {key: torch.zeros_like(x) for key, x in truth.items() if key.startswith("model.layers")}
    sampler, num_chunks = Fixed(), 3
    model = chunk_model(
        model_of(name), ChunkConfig(chunk_size=16, sampler=sampler, attention="math", control_variate=False)
    )
    for subset in range(2**num_chunks):
        sampler.weights = torch.tensor([2.0 * (subset >> index & 1) for index in range(num_chunks)])
        for key, x in gradients(model, inputs).items():
            if key in mean:
                mean[key] += x / 2**num_chunks
    assert max(float((mean[key] - truth[key]).norm() / truth[key].norm()) for key in mean) < 1e-10
    drops = chunk_model(
        model_of(name), ChunkConfig(chunk_size=16, sampler=IndependentSampler(budget=1), attention="math")
    )
    gradients(drops, inputs)


def test_a_router_that_drops_tokens_is_refused() -> None:
    whole = router_logits.WholeSequence(2, 20)
    with pytest.raises(ValueError, match=r"returns logits of shape \(13, 4\) for 2 row\(s\) of 7 tokens"):
        whole.add(router_logits.Chunk(0, 7), [torch.zeros(13, 4)])


def test_too_little_memory_gives_logits_of_the_right_shape() -> None:
    model = chunk_model(model_of("MixtralForCausalLM"), ChunkConfig(chunk_size=7))
    with recovering() as recovery, memory_for(0, "forward"):
        output = model(**inputs_of("padded"), output_router_logits=True)
        output.loss.backward()
    assert recovery.error is not None
    assert [x.shape for x in output.router_logits] == [(2 * 37, 4)] * 3


def test_what_no_hook_records_is_refused() -> None:
    model = chunk_model(tiny_model("LlamaForCausalLM"), ChunkConfig(chunk_size=7))
    with pytest.raises(ValueError, match="output_router_logits=True, but a chunked forward"):
        model(**inputs_of("padded"), output_router_logits=True)
