"""The time of a training step: chunked, and with Hugging Face's gradient checkpointing, in one process.

A step is a forward with its loss and a backward, without the optimizer. All ways run on the same weights and
tokens, with flash attention and the same tiled loss, in turn, in an order that rotates: what disturbs the
machine disturbs all of them. A ratio is the median of the ratios of each round.

    python -m chunkdist.bench.step [--smoke] [--json FILE] [--repetitions N] [--device cuda] [--offload]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.bench.environment import provenance, write_result
from chunkdist.lazy_logits import lazy_logits

BASELINE = "gradient checkpointing"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A Llama, and the sequence it is trained on."""

    num_tokens: int
    chunk_size: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    def model(self, device: str, dtype: torch.dtype) -> PreTrainedModel:
        """The model, with random weights: neither speed nor memory depend on their values."""
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.num_tokens,
            use_cache=False,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        model.train()
        return model


SIZES = {
    "smoke": Sizes(
        num_tokens=64,
        chunk_size=16,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
    ),
    "10m": Sizes(
        num_tokens=8192,
        chunk_size=1024,
        vocab_size=256,
        hidden_size=320,
        intermediate_size=896,
        num_layers=8,
        num_heads=5,
        num_kv_heads=5,
    ),
    "1b": Sizes(
        num_tokens=32768,
        chunk_size=4096,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of one way. `cpu_s` is of all threads of the process; memory is the GPU's, `None` on a CPU."""

    round: int
    way: str
    wall_s: float
    cpu_s: float
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None


def ways(chunk_size: int, *, offload: bool = False) -> dict[str, ChunkConfig | None]:
    """What is compared, by name; `None` is the baseline."""
    offloaded = {"chunked, host offload": ChunkConfig(chunk_size=chunk_size, offload="host")}
    return {
        BASELINE: None,
        "chunked, K/V kept": ChunkConfig(chunk_size=chunk_size, rebuild_kv=False),
        "chunked, K/V rebuilt (default)": ChunkConfig(chunk_size=chunk_size),
        "chunked, one group of all layers": ChunkConfig(chunk_size=chunk_size, layers_per_group="all"),
        **(offloaded if offload else {}),
    }


def measure(
    sizes: Sizes,
    *,
    device: str,
    dtype: torch.dtype,
    num_rounds: int,
    report: Callable[[str], None],
    offload: bool = False,
) -> dict[str, Any]:
    """Runs every way once to warm up, then `num_rounds` times; returns what the JSON holds of it.

    The warm-up compares the gradients: a fast wrong step is no step.
    """
    model = sizes.model(device, dtype)
    ids = torch.randint(
        0, sizes.vocab_size, (1, sizes.num_tokens), generator=torch.Generator().manual_seed(1)
    ).to(device)
    contenders = ways(sizes.chunk_size, offload=offload)
    steps: list[Step] = []
    expected: dict[str, Tensor] = {}
    differences: dict[str, float] = {}
    for way, config in contenders.items():
        report(f"warm-up: {way}")
        _timed_step(model, ids, config, way=way, number=0)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if config is None:
            expected = {name: grad.clone() for name, grad in grads.items()}
        differences[way] = _largest_difference(grads, expected)
    expected.clear()
    names = list(contenders)
    for number in range(1, num_rounds + 1):
        report(f"round {number} of {num_rounds}")
        shift = (number - 1) % len(names)
        for way in names[shift:] + names[:shift]:
            steps.append(_timed_step(model, ids, contenders[way], way=way, number=number))
    return {
        "model": {
            **asdict(sizes),
            "num_parameters": model.num_parameters(),
            "dtype": str(dtype).removeprefix("torch."),
        },
        "summary": {
            way: {**_summary(steps, way), "largest_gradient_difference": differences[way]} for way in names
        },
        "steps": [asdict(step) for step in steps],
    }


def _timed_step(
    model: PreTrainedModel, ids: Tensor, config: ChunkConfig | None, *, way: str, number: int
) -> Step:
    on_gpu = ids.is_cuda
    model.zero_grad(set_to_none=True)
    if config is None:
        set_checkpointing(model, True)
        same_loss: AbstractContextManager[None] = lazy_logits(model)
    else:
        chunk_model(model, config)
        if config.offload == "host":  # its memory is pinned in the first step
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad(set_to_none=True)
        same_loss = nullcontext()  # a chunked model does it itself
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    with same_loss:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    if config is None:
        set_checkpointing(model, False)
    else:
        unchunk_model(model)
    return Step(
        round=number,
        way=way,
        wall_s=wall_s,
        cpu_s=cpu_s,
        peak_allocated_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        peak_reserved_bytes=torch.cuda.max_memory_reserved() if on_gpu else None,
    )


def set_checkpointing(model: Any, on: bool) -> None:
    """Hugging Face's gradient checkpointing, under the name that this version of transformers has for it."""
    # `activation_*` is new in transformers 5, the old names go with version 6: then this needs no choice
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def _largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all parameters, the norm of the difference, relative to the norm."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - expected[name]).float().norm() / expected[name].float().norm())
        for name in expected
    )


def _summary(steps: Sequence[Step], way: str) -> dict[str, float | int | None]:
    mine = [step for step in steps if step.way == way]
    base = [step for step in steps if step.way == BASELINE]
    result: dict[str, float | int | None] = {}
    for name in ("wall_s", "cpu_s"):
        times, base_times = ([getattr(step, name) for step in part] for part in (mine, base))
        rounds = zip(_by_round(mine, name), _by_round(base, name), strict=True)
        ratios = [time_s / max(base_s, 1e-9) for time_s, base_s in rounds]
        short = name.removesuffix("_s")
        result |= {
            f"median_{name}": statistics.median(times),
            f"{short}_ratio": statistics.median(ratios),
            f"{short}_ratio_lowest": min(ratios),
            f"{short}_ratio_highest": max(ratios),
            f"{short}_ratio_of_fastest": min(times) / max(min(base_times), 1e-9),
        }
    peaks = [step.peak_allocated_bytes for step in mine if step.peak_allocated_bytes is not None]
    return result | {"peak_allocated_bytes": max(peaks, default=None)}


def _by_round(steps: Sequence[Step], name: str) -> list[float]:
    return [getattr(step, name) for step in sorted(steps, key=lambda step: step.round)]


def table(result: dict[str, Any]) -> str:
    """The summary, for people to read."""
    model, machine = result["model"], result["hardware"]
    lines = [
        f"Llama of {model['num_parameters'] / 1e6:.1f}M parameters ({model['num_layers']} layers, hidden "
        f"{model['hidden_size']}, vocabulary {model['vocab_size']:,}), {model['dtype']}, "
        f"{model['num_tokens']:,} tokens in chunks of {model['chunk_size']:,}",
        f"{machine.get('gpu', machine['cpu'])}, {machine['num_threads']} CPU threads, "
        f"medians of {result['num_repetitions']} rounds",
        "",
        f"{'':34}{'wall time':>11}{'ratio':>8}{'CPU time':>11}{'ratio':>8}{'gradients':>11}{'peak':>11}",
    ]
    for way, row in result["summary"].items():
        peak = row["peak_allocated_bytes"]
        lines.append(
            f"{way:34}{row['median_wall_s']:9.3f} s{row['wall_ratio']:8.3f}"
            f"{row['median_cpu_s']:9.3f} s{row['cpu_ratio']:8.3f}{row['largest_gradient_difference']:11.1e}"
            + (f"{peak / 2**30:7.2f} GiB" if peak else f"{'-':>11}")
        )
    lines += ["", f"ratio: to {BASELINE}, median over rounds; gradients: largest relative difference from it"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="chunkdist bench step", description="Time of a chunked step against checkpointing."
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, in seconds: the figures mean nothing"
    )
    models = [name for name in SIZES if name != "smoke"]
    parser.add_argument("--model", choices=models, default="10m", help="default: 10m")
    parser.add_argument("--num-tokens", type=int, help="tokens of the sequence; default: the model's own")
    parser.add_argument("--chunk-size", type=int, help="tokens of a chunk; default: the model's own")
    parser.add_argument("--repetitions", type=int, help="rounds; default: 7, with --smoke 2")
    parser.add_argument("--device", default="cpu", help="cpu (fp32) or cuda (bf16)")
    parser.add_argument("--offload", action="store_true", help="host offload, too")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    options = parser.parse_args(given)
    sizes = SIZES["smoke" if options.smoke else options.model]
    given_sizes = {key: getattr(options, key) for key in ("num_tokens", "chunk_size")}
    sizes = replace(sizes, **{key: value for key, value in given_sizes.items() if value is not None})
    num_rounds = (2 if options.smoke else 7) if options.repetitions is None else options.repetitions
    counts = {"repetitions": num_rounds, "num-tokens": sizes.num_tokens, "chunk-size": sizes.chunk_size}
    for name, count in counts.items():
        if count < 1:
            parser.error(f"--{name} {count} is no count: write an integer >= 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = torch.float32 if torch.device(options.device).type == "cpu" else torch.bfloat16
    result = {
        **provenance("step", given, device=options.device),
        "num_repetitions": num_rounds,
        **measure(
            sizes,
            device=options.device,
            dtype=dtype,
            num_rounds=num_rounds,
            offload=options.offload,
            report=lambda line: print(line, file=sys.stderr),
        ),
    }
    print(table(result))
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
