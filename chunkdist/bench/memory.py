"""Peak memory of a training step of an 8B model, by sequence length, on a machine without a GPU.

The real code runs under fake tensors, which have shapes and no storage, and the bytes of all live tensors are
counted op by op. Weights are not counted: they are the same for all ways. Neither are a kernel's scratch
space and an allocator's rounding: a GPU takes somewhat more. All ways have flash attention, bf16, and the
same tiled loss; the last one, as transformers does it, makes all logits.

Layers are alike: each adds the same to the peak. So models of few layers are run, that this holds for them is
checked, and the figures for all layers follow.

    python -m chunkdist.bench.memory [--smoke] [--json FILE] [--num-tokens N ...] [--only WORD]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig

from chunkdist import ChunkConfig, chunk_model
from chunkdist.bench.environment import provenance, write_result
from chunkdist.bench.options import parsed, parser_of
from chunkdist.bench.sizes import LLAMA_3_8B
from chunkdist.bench.ways import BASELINE, set_checkpointing
from chunkdist.chunking import host_memory
from chunkdist.loss.lazy_logits import lazy_logits
from chunkdist.memory import LiveBytes
from chunkdist.memory.fake_model import fake_model

NUM_LAYERS_RUN = (8, 12, 16)
SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is run: in chunks, or, without a config, with Hugging Face's gradient checkpointing; and the
    numbers of layers that are run to know about all."""

    name: str
    config: ChunkConfig | None = None
    tiled_loss: bool = True
    num_layers_run: tuple[int, int, int] = NUM_LAYERS_RUN


def ways(chunk_size: int) -> list[Way]:
    def chunked(name: str, few: tuple[int, int, int] = NUM_LAYERS_RUN, **settings: Any) -> Way:
        config = ChunkConfig(chunk_size=chunk_size, attention="varlen", **settings)
        return Way(name=name, config=config, num_layers_run=few)

    return [
        Way(name=BASELINE),
        chunked("chunked, K/V rebuilt (default)"),
        chunked("chunked, K/V kept", rebuild_kv=False),
        chunked("chunked, groups of 4 layers, K/V rebuilt", layers_per_group=4, rebuild_kv=True),
        chunked("chunked, groups of 2 layers, K/V rebuilt", (4, 6, 8), layers_per_group=2, rebuild_kv=True),
        chunked("chunked, one group of all layers", layers_per_group="all"),
        chunked("chunked, host offload", (2, 3, 4), offload="host"),
        chunked("chunked, host offload, K/V kept", (2, 3, 4), offload="host", rebuild_kv=False),
        Way(name="gradient checkpointing, all logits", tiled_loss=False),
    ]


def peak_bytes(way: Way, sizes: dict[str, int], num_tokens: int) -> tuple[int, int]:
    """The largest sum of live tensors in one LoRA step, over the weights: on the device, and on the host."""
    with FakeTensorMode() as mode:
        model: Any = fake_model(lambda: _lora_llama(sizes, num_tokens), mode)
        if way.config is not None:
            chunk_model(model, way.config)
        else:
            set_checkpointing(model, True)
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        causal_lm = model.get_base_model()
        same_loss = lazy_logits(causal_lm) if way.config is None and way.tiled_loss else nullcontext()
        host = None if way.config is None else host_memory(model)
        with LiveBytes(exclude=[*model.parameters(), *model.buffers(), ids], host=host) as live:
            with same_loss:
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        return live.peak_bytes, 0 if host is None else host.held_bytes


def weight_bytes(sizes: dict[str, int]) -> int:
    """Of the model's weights and its adapters, in bf16."""
    with torch.device("meta"):
        return sum(p.numel() * p.element_size() for p in _lora_llama(sizes, 1).parameters())


def _lora_llama(sizes: dict[str, int], num_tokens: int) -> nn.Module:
    settings: dict[str, Any] = {**sizes, "max_position_embeddings": num_tokens, "use_cache": False}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**settings), dtype=torch.bfloat16, attn_implementation=_FLASH
    )
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


_FLASH = "chunkdist_bench"


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The kernel itself: for fake tensors `scaled_dot_product_attention` picks one with a T x T matrix."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = kernel(query, key, value, 0.0, True)[0]
    return out.transpose(1, 2), None


def _no_mask(**kwargs: Any) -> None:
    return None


AttentionInterface.register(_FLASH, _flash)
AttentionMaskInterface.register(_FLASH, _no_mask)


def measure(
    sizes: dict[str, int],
    *,
    lengths: Sequence[int],
    chunk_size: int,
    report: Callable[[str], None],
    only: str = "",
) -> dict[str, Any]:
    """Every way whose name has the word `only`, at every length; returns what the JSON holds of it."""
    figures: dict[str, Any] = {}
    for way in (way for way in ways(chunk_size) if only in way.name):
        measured: dict[int, dict[int, int]] = {}
        on_host: dict[int, dict[int, int]] = {}
        for num_tokens in lengths:
            report(f"{way.name}: {num_tokens:,} tokens")
            few = way.num_layers_run if num_tokens == lengths[0] else way.num_layers_run[:2]
            measured[num_tokens], on_host[num_tokens] = {}, {}
            for num in few:
                found = peak_bytes(way, {**sizes, "num_hidden_layers": num}, num_tokens)
                measured[num_tokens][num], on_host[num_tokens][num] = found
        peaks, host = (
            {length: of_all_layers(by_layers, sizes["num_hidden_layers"]) for length, by_layers in of.items()}
            for of in (measured, on_host)
        )
        slope = (peaks[lengths[-1]] - peaks[lengths[0]]) / (lengths[-1] - lengths[0])
        figures[way.name] = {
            "bytes_per_token": slope,
            "peak_bytes": peaks,
            "host_bytes": host,
            "peak_bytes_by_layers_run": measured,
        }
    model = {**sizes, "dtype": "bfloat16", "lora_rank": 8}
    return {"model": model, "chunk_size": chunk_size, "summary": figures}


def _check_layers_are_alike(way: Way, peaks: dict[int, int]) -> None:
    few, some, more = (peaks[num] for num in sorted(peaks))
    if some - few != more - some:
        raise RuntimeError(f"{way.name}: layers do not add the same to the peak ({peaks}): run all of them")


def of_all_layers(peaks: dict[int, int], num_layers: int) -> int:
    """The peak of a model of `num_layers`, from those of models with the two numbers of layers in `peaks`."""
    few, some = sorted(peaks)[:2]
    return peaks[few] + (peaks[some] - peaks[few]) * (num_layers - few) // (some - few)


def table(result: dict[str, Any]) -> str:
    """The summary, for people to read."""
    summary = result["summary"]
    lengths = list(next(iter(summary.values()))["peak_bytes"])
    lines = [f"{'':42}{'a token':>14}" + "".join(f"{int(length):>12,}" for length in lengths)]
    for name, row in summary.items():
        peaks = "".join(f"{peak / 2**30:8.2f} GiB" for peak in row["peak_bytes"].values())
        lines.append(f"{name:42}{row['bytes_per_token'] / 1024:10.1f} KiB{peaks}")
        if any(row["host_bytes"].values()):
            on_host = "".join(f"{size / 2**30:8.2f} GiB" for size in row["host_bytes"].values())
            lines.append(f"{'':12}{'on the host':44}{on_host}")
    lines += [
        "",
        "peak over the weights, by tokens of the sequence; a token: between the first and last length",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = parser_of("memory", "Peak memory of a step, by sequence length.")
    parser.add_argument("--only", default="", metavar="WORD", help="the ways whose names have it")
    parser.add_argument("--num-tokens", type=int, nargs="+", help="ascending; default: 16384 32768")
    options = parsed(parser, given)
    lengths = options.num_tokens or ([32, 64] if options.smoke else [2**14, 2**15])
    if len(lengths) < 2 or lengths != sorted(set(lengths)) or lengths[0] < 1:
        parser.error(f"--num-tokens {lengths}: write two or more lengths, ascending")
    if not any(options.only in way.name for way in ways(1)):
        parser.error(f"--only {options.only}: no way has it in its name")
    result = {
        **provenance("memory", given),
        "method": "live bytes under FakeTensorMode; no GPU",
        **measure(
            SMALL if options.smoke else LLAMA_3_8B,
            lengths=lengths,
            chunk_size=16 if options.smoke else 2048,
            only=options.only,
            report=lambda line: print(line, file=sys.stderr),
        ),
    }
    print(table(result))
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
