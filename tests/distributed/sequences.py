"""Sequence parallelism on gloo ranks, against one process with the whole rows: many cases in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, MistralConfig, PreTrainedModel

from chunkdist import ChunkConfig, chunk_model
from chunkdist.attention.heads import HeadExchange
from chunkdist.sharding.sequence import TokenExchange
from tests.distributed.cases import Case, Errors, errors_of
from tests.helpers.hybrids import model_of
from tests.helpers.model_zoo import tiny_model
from tests.helpers.models import (
    VOCAB_SIZE,
    batch,
    gradients,
    left_padded,
    norms_in_fp64,
    packed_batch,
    padded_batch,
    tiny_llama,
    with_lora,
    with_positions,
)

SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "attn_implementation": "plain", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _of(config: type, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config(**{**SMALL, **settings})).to(
        torch.float64
    )
    return model.train()


def _sinks() -> PreTrainedModel:
    model = _of(
        GptOssConfig, num_local_experts=2, num_experts_per_tok=2, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"], experts_implementation="eager",
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            nn.init.normal_(parameter)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "as many kv heads": lambda: tiny_llama(num_key_value_heads=4),
    "2 kv heads": tiny_llama,
    "1 kv head": lambda: tiny_llama(num_key_value_heads=1),
    "tied embeddings": lambda: tiny_llama(tie_word_embeddings=True),
    "LoRA": lambda: with_lora(tiny_llama()),
    "LoRA on q alone": lambda: with_lora(tiny_llama(), target_modules=["q_proj"]),
    "window": lambda: _of(MistralConfig, sliding_window=6),
    "window, soft-cap": lambda: norms_in_fp64(
        _of(
            Gemma2Config,
            sliding_window=6,
            attn_logit_softcapping=2.0,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "window, sinks": _sinks,
}
NUM_TOKENS = 36
INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "one row": lambda: batch(num_tokens=NUM_TOKENS),
    "two rows": lambda: batch(num_rows=2, num_tokens=NUM_TOKENS),
    "packed": lambda: packed_batch([5, 1, 17, 13]),
    "packed rows": lambda: {
        key: torch.cat([x, packed_batch([30, 6], seed=3)[key]])
        for key, x in packed_batch([5, 1, 17, 13]).items()
    },
    "right padding": lambda: padded_batch([NUM_TOKENS, 21, 3]),
    "left padding": lambda: left_padded([NUM_TOKENS, 21, 3]),
    "left padding, positions": lambda: with_positions(left_padded([NUM_TOKENS, 21, 3])),
    "a prompt without labels": lambda: _prompt(21),
}


def _prompt(num_tokens: int) -> dict[str, Tensor]:
    inputs = batch(num_tokens=NUM_TOKENS)
    inputs["labels"][:, :num_tokens] = -100
    return inputs


@dataclass(frozen=True, kw_only=True)
class SequenceCase:
    """One step of a model whose rows the ranks share.

    Args:
        chunk_size: Tokens of a chunk, of all ranks; 0: one a rank.
        embeds: Rows are passed as embeddings, whose gradient is compared, too.
        shifted: Labels are passed as `shift_labels`.
    """

    model: str = "2 kv heads"
    inputs: str = "one row"
    chunk_size: int = 8
    settings: dict[str, Any] = field(default_factory=dict)
    embeds: bool = False
    shifted: bool = False


def part_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of the rows."""
    size, rank = distributed.get_world_size(), distributed.get_rank()
    num = inputs["labels"].shape[1] // size
    return {name: x[:, rank * num : (rank + 1) * num] for name, x in inputs.items()}


def step_error(case: SequenceCase) -> float:
    """The largest relative error, over all gradients, of their sums over the ranks; and of the loss."""
    size = distributed.get_world_size()
    inputs = INPUTS[case.inputs]()
    model, reference = MODELS[case.model](), MODELS[case.model]()
    settings = {"attention": "math", **case.settings}
    if "sampler" in settings:
        own = ChunkConfig(chunk_size=case.chunk_size or size, **settings)
        chunk_model(reference, own)
    num_items = (inputs["labels"][:, 1:] != -100).sum()
    if case.shifted:
        inputs["shift_labels"] = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    if case.embeds:
        table = model.get_input_embeddings()  # type: ignore[operator]
        inputs["inputs_embeds"] = table(inputs.pop("input_ids")).detach().requires_grad_()
    expected = gradients(reference, inputs)
    chunk_model(
        model,
        ChunkConfig(chunk_size=case.chunk_size or size, **settings),
        sequence_group=distributed.group.WORLD,
    )
    embeds = inputs.get("inputs_embeds")
    if embeds is not None:
        expected["inputs_embeds"] = embeds.grad  # type: ignore[assignment]
        embeds.grad = None
    found = gradients(model, {**part_of(inputs), "num_items_in_batch": num_items})
    if embeds is not None:
        found["inputs_embeds"] = embeds.grad  # type: ignore[assignment]
    worst = 0.0
    for name, x in expected.items():
        if name == "lm_head.weight" or "embed" not in name or not case.embeds or name == "inputs_embeds":
            total = found.get(name, torch.zeros_like(x)).clone()
            distributed.all_reduce(total)
            error = float((total - x).norm() / x.norm())
            worst = max(worst, error * (1e-4 if name == "loss" else 1.0))  # which is computed in fp32
    assert expected.keys() == found.keys()
    return worst


def step_errors(cases: dict[str, SequenceCase]) -> dict[str, float]:
    return {name: step_error(case) for name, case in cases.items()}


def engine_errors(cases: dict[str, Case]) -> dict[str, Errors]:
    return {name: errors_of(case) for name, case in cases.items()}


def _refused(inputs: dict[str, Any], model: nn.Module | None = None, **settings: Any) -> str:
    try:
        config = ChunkConfig(**{"chunk_size": 8, **settings})
        model = chunk_model(model or tiny_llama(), config, sequence_group=distributed.group.WORLD)
        model(**inputs)
    except ValueError as error:
        return str(error)
    return "nothing"


def refusals() -> dict[str, str]:
    """What each rank is told of what ranks cannot share."""
    rank = distributed.get_rank()
    rows = part_of(batch(num_tokens=NUM_TOKENS))
    labelled = padded_batch([NUM_TOKENS, 20])
    labelled["labels"][1, -1] = 5
    cut = {name: x[:, : x.shape[1] - rank] for name, x in rows.items()}
    return {
        "lengths": _refused(cut),
        "arguments": _refused(
            {**rows, "attention_mask": torch.ones_like(rows["input_ids"])} if rank else rows
        ),
        "chunk": _refused(rows, chunk_size=9),
        "auto": _refused(rows, chunk_size="auto"),
        "heads": _refused(rows, tiny_llama(num_attention_heads=3, num_key_value_heads=3, hidden_size=48)),
        "forest": _refused(rows, share_prefixes=True),
        "labels of padding": _refused(part_of(labelled)),
        "state": _refused(rows, model_of("Qwen3_5ForCausalLM")),
        "positions of its own": _refused(rows, tiny_model("RobertaForCausalLM")),
        "hidden states": _refused({**rows, "output_hidden_states": True}),
        "bounds": _refused({**rows, "cu_seq_lens_q": torch.tensor([0, NUM_TOKENS])}),
        "a cache": _refused({**rows, "use_cache": True}),
    }


def planted() -> dict[str, float]:
    """Errors where the exchange is broken."""
    real = HeadExchange.scatter_tokens, HeadExchange.own, TokenExchange.run

    def without_last(self: HeadExchange, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.cat([x[:, :, :-1], 0 * x[:, :, -1:]], 2) for x in real[0](self, tensors))

    def as_passed(self: TokenExchange, x: Tensor, to_chunks: bool) -> Tensor:
        return x if to_chunks else real[2](self, x, to_chunks)

    errors = {}
    for name, owner, attribute, fault, case in (
        ("heads", HeadExchange, "scatter_tokens", without_last, SequenceCase()),
        ("sinks", HeadExchange, "own", lambda self, x: x[: len(x) // 2], SequenceCase(model="window, sinks")),
        ("tokens", TokenExchange, "run", as_passed, SequenceCase(embeds=True)),
    ):
        before = getattr(owner, attribute)
        setattr(owner, attribute, fault)
        try:
            errors[name] = step_error(case)
        finally:
            setattr(owner, attribute, before)
    return errors
