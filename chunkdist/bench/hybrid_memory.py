"""Peak memory of a training step of Qwen3.5-9B, whose layers mostly keep state instead of keys and values.

As `chunkdist.bench.memory`: the real code under fake tensors, live bytes over the weights, LoRA in bf16. The
linear-attention layers run as transformers' torch code computes them; fused kernels need less.

A step has its peak in one of three places: at the loss, in the backward of the attention layer at the top, or
in that of the layer with state below it. In each of them, a layer more adds its input, and a layer with state
its state at the chunks' starts. So two layers are run, one of each kind; that this holds is checked with four
layers, and the figures for all follow.

Up to 131,072 tokens are counted. What more add is what the formula of docs/memory.md says; that it is right
is checked between the two longest that are counted.

    python -m chunkdist.bench.hybrid_memory [--smoke] [--json FILE]     # ten minutes on one core
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from chunkdist import ChunkConfig, chunk_model
from chunkdist.bench.environment import provenance, write_result
from chunkdist.bench.options import parsed, parser_of
from chunkdist.chunking import chunk_report, layers_of
from chunkdist.memory import LiveBytes
from chunkdist.memory.fake_model import fake_model

PERIOD = 4
"""Three layers with state and one that attends, in this order."""
LENGTHS = tuple(2**power for power in range(14, 19))
COUNTED = LENGTHS[:4]
QWEN3_5_9B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "vocab_size": 248320,
}
"""Sizes of a `Qwen3_5TextConfig`."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "vocab_size": 64,
}
PLACES = ("the loss", "an attention layer", "a layer with state")
"""Where a step may have its peak; the second and third are those at the top."""

Peaks = dict[str, int]
"""By place, bytes."""


def peaks_of(sizes: dict[str, int], chunk_size: int, num_layers: int, num_tokens: int) -> tuple[Peaks, int]:
    """The peaks in the three places, and the bytes of all layers' states at one chunk's start."""
    places: Peaks = {}
    with FakeTensorMode() as mode:
        model: Any = fake_model(lambda: _model({**sizes, "num_hidden_layers": num_layers}), mode)
        chunk_model(model, ChunkConfig(chunk_size=chunk_size, attention="varlen"))
        state = chunk_report(model).state
        assert state is not None
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        live = LiveBytes(exclude=[*model.parameters(), *model.buffers(), ids])

        def next_place(name: str) -> None:
            places[name] = live.peak_bytes
            live.reset_peak()

        def end_at(place: str, module: nn.Module) -> None:
            """`place` is where the step is until the gradient of the module's output has been computed."""

            def watch(_: nn.Module, __: Any, output: Tensor) -> None:
                output.register_hook(lambda grad: next_place(place))

            module.register_forward_hook(watch)

        top = [layer.layer for layer in layers_of(model)][::-1]
        for place, module in zip(PLACES, top[:3], strict=False):
            end_at(place, module)
        with live:
            model(input_ids=ids, labels=ids).loss.backward()
        if len(top) < 3:
            next_place(PLACES[2])
    return places, state.state_bytes


def _model(sizes: dict[str, int]) -> nn.Module:
    kinds = ["linear_attention"] * (sizes["num_hidden_layers"] - 1) + ["full_attention"]
    settings: dict[str, Any] = {**sizes, "layer_types": kinds, "max_position_embeddings": LENGTHS[-1]}
    config = Qwen3_5TextConfig(**settings, use_cache=False)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "in_proj_qkv"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.enable_input_require_grads()  # so that the first layer does what the others do
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def growing_bytes(
    place: str,
    sizes: dict[str, int],
    *,
    num_layers: int,
    num_tokens: int,
    state_bytes: int,
    num_starts: int,
) -> int:
    """docs/memory.md: what grows with the sequence.

    Args:
        state_bytes: Of all layers.
        num_starts: Chunks that begin with a state.
    """
    hidden = 2 * sizes["hidden_size"]
    kv = 4 * sizes["num_key_value_heads"] * sizes["head_dim"]
    per_query_head = 4 * sizes["num_attention_heads"] * sizes["head_dim"]
    rotary = 2 * 2 * sizes["head_dim"] // 4 + 8  # cosine and sine of a quarter of a head, and the position
    if place == "a layer with state":
        per_token = (num_layers + 1) * hidden
    else:
        per_token = (num_layers + 2) * hidden + 4 * kv + per_query_head
    return (per_token + rotary) * num_tokens + num_starts * state_bytes


def measure(
    sizes: dict[str, int], *, chunk_size: int, lengths: Sequence[int], counted: Sequence[int]
) -> dict[str, Any]:
    """What the JSON holds; `counted` are the first of the lengths, two or more."""
    num_layers = sizes["num_hidden_layers"]
    num_states = num_layers * (PERIOD - 1) // PERIOD
    measured: dict[int, Peaks] = {}
    state_bytes = 0  # of a layer
    for num_tokens in counted:
        print(f"{num_tokens:,} tokens", file=sys.stderr)
        measured[num_tokens], state_bytes = peaks_of(sizes, chunk_size, 2, num_tokens)

    def grown(place: str, num_tokens: int, *, layers: int = 2, states: int = 1) -> int:
        return growing_bytes(
            place, sizes, num_layers=layers, num_tokens=num_tokens,
            state_bytes=states * state_bytes, num_starts=num_tokens // chunk_size - 1,
        )  # fmt: skip

    before, longest = counted[-2:]
    for place in PLACES[1:]:
        added = measured[longest][place] - measured[before][place]
        if abs(grown(place, longest) - grown(place, before) - added) > 0.05 * added:
            raise RuntimeError(
                f"{place}: the formula is wrong about {longest - before} tokens more: {measured}"
            )
    for num_tokens in lengths[len(counted) :]:
        measured[num_tokens] = {
            place: measured[longest][place] + grown(place, num_tokens) - grown(place, longest)
            for place in PLACES[1:]
        }

    def with_more_layers(num_tokens: int, more: int, more_states: int) -> Peaks:
        added = more * 2 * sizes["hidden_size"] * num_tokens
        added += more_states * state_bytes * (num_tokens // chunk_size - 1)
        return {place: peak + added for place, peak in measured[num_tokens].items()}

    check, expected = peaks_of(sizes, chunk_size, PERIOD, lengths[0])[0], with_more_layers(lengths[0], 2, 2)
    if any(abs(check[place] - expected[place]) > 0.01 * check[place] for place in PLACES):
        raise RuntimeError(f"a layer more does not add its input and its state: {check}, not {expected}")

    graphs = {place: measured[before][place] - grown(place, before) for place in PLACES[1:]}
    rows = {}
    for num_tokens in lengths:
        peaks = with_more_layers(num_tokens, num_layers - 2, num_states - 1)
        place = max(peaks, key=lambda name: peaks[name])
        expected_bytes = max(
            grown(where, num_tokens, layers=num_layers, states=num_states) + graphs[where] for where in graphs
        )
        rows[num_tokens] = {
            "peak_bytes": peaks[place],
            "counted": num_tokens in counted,
            "place": place,
            "formula_bytes": expected_bytes,
        }
    return {
        "model": {**sizes, "dtype": "bfloat16", "lora_rank": 8},
        "chunk_size": chunk_size,
        "state_bytes": num_states * state_bytes,
        "graph_bytes": graphs,
        "peak_bytes_of_two_layers": measured,
        "peak_bytes_of_four_layers": {lengths[0]: check},
        "summary": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The summary, as docs/memory.md has it."""
    lines = ["| tokens | peak over the weights | | where | by the formula |", "|---|---|---|---|---|"]
    for num_tokens, row in result["summary"].items():
        peak, expected = row["peak_bytes"], row["formula_bytes"]
        lines.append(
            f"| {int(num_tokens):,} | {peak / 2**30:.2f} GiB | "
            f"{'counted' if row['counted'] else 'from the growth'} | {row['place']} | "
            f"{expected / 2**30:.2f} GiB ({expected / peak - 1:+.1%}) |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("hybrid-memory", "Peak memory of a step of a hybrid model.")
    options = parsed(parser, given)
    result = {
        **provenance("hybrid-memory", given),
        "method": "live bytes under FakeTensorMode; no GPU",
        **measure(
            SMALL if options.smoke else QWEN3_5_9B,
            chunk_size=64 if options.smoke else 2048,
            lengths=(256, 512, 1024) if options.smoke else LENGTHS,
            counted=(256, 512) if options.smoke else COUNTED,
        ),
    }
    print(table(result))
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
