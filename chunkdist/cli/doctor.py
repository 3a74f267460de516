"""`chunkdist doctor`: whether this machine can train, in under two minutes, before a model is downloaded.

Every check is one that exists elsewhere, on small sizes: the first kernel, attention kernels against `math`
(`chunkdist.bench.attention`), gradients chunked against unchunked, pinned memory, a layer's speed, a plan.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from chunkdist.attention import BACKENDS
from chunkdist.attention.math import MathBackend
from chunkdist.bench.attention import LARGEST_ERROR, Case, cases, errors
from chunkdist.bench.models import SIZES, Sizes
from chunkdist.bench.timing import cost_of, matmul_flops
from chunkdist.check.gradients import check_gradients
from chunkdist.chunking import chunk_model
from chunkdist.cli.environment import environment_rows
from chunkdist.config import ChunkConfig
from chunkdist.memory.auto import USABLE_SHARE, card_of, free_bytes
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.planner import Job, NothingFits, gib, longest_length, plan_step
from chunkdist.models.flops import StepFlops
from chunkdist.stores.free_memory import free_host_bytes
from chunkdist.stores.host_blocks import Block
from chunkdist.stores.host_memory import Copies
from chunkdist.train.launch.usable_gpu import driver_version, try_first_kernel, why_gpu_is_idle

_AUTO = ChunkConfig(chunk_size="auto", layers_per_group="auto", retained_chunks="auto", offload="auto")
_LAYER = Sizes(8192, 2048, 256, 4096, 14336, 1, 32, 8)
"""One layer of Llama-3-8B."""
_SMALL_LAYER = Sizes(256, 64, 256, 256, 704, 1, 4, 2)
_PINNED_BYTES = 2**28
_PLANNED_TOKENS = 32768


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row.

    Args:
        to_do: What helps; empty where nothing is wrong.
    """

    what: str
    found: str
    to_do: str = ""


def run_doctor(json_file: Path, console: Console) -> int:
    """Prints a table, writes it to a file, and returns 1 where something is wrong, else 0."""
    begun = time.monotonic()
    environment, findings = environment_rows(), []
    for finding in _findings():
        findings.append(finding)
    table = Table(title="chunkdist doctor", title_justify="left", header_style="", show_header=False)
    for name, value in environment:
        table.add_row(name, value, "")
    table.add_section()
    for finding in findings:
        table.add_row(finding.what, finding.found, "WRONG" if finding.to_do else "ok")
    console.print(table)
    wrong = [finding for finding in findings if finding.to_do]
    for finding in wrong:
        console.print(f"{finding.what}: {finding.to_do}")
    seconds = time.monotonic() - begun
    told = {
        "environment": dict(environment),
        "findings": [asdict(x) for x in findings],
        "passed": not wrong,
        "seconds": seconds,
    }
    json_file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    verdict = f"{len(wrong)} of {len(findings)} checks found something wrong" if wrong else "nothing is wrong"
    console.print(f"{verdict}, after {seconds:.0f} s; written to {json_file}, to be sent in with a report")
    return 1 if wrong else 0


def _findings() -> Iterator[Finding]:
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")
    yield _driver(device)
    first = _checked("first kernel", lambda: _first_kernel(device))
    yield first
    if first.to_do:
        return  # whatever came now would fail for that reason
    yield from _kernels(device)
    yield _checked("gradients", lambda: _gradients(device))
    yield _checked("pinned memory", lambda: _pinned(device))
    yield _checked("a layer's speed", lambda: _speed(device))
    yield _checked("plan", lambda: _plan(device))


def _checked(what: str, check: Callable[[], Finding]) -> Finding:
    """What a check finds; an error is something found."""
    try:
        return check()
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        return Finding(what=what, found="failed", to_do=f"{said[:400]}; if that says nothing, send this in")


def _driver(device: torch.device) -> Finding:
    what = "driver and wheel"
    if (why := why_gpu_is_idle()) is not None:
        return Finding(what=what, found="not usable", to_do=why)
    if device.type == "cpu":
        return Finding(what=what, found="no NVIDIA GPU here: trained is on the CPU")
    driver = driver_version() or "of an unknown version"
    return Finding(what=what, found=f"driver {driver}, torch for CUDA {torch.version.cuda}")


def _first_kernel(device: torch.device) -> Finding:
    try_first_kernel(device)
    return Finding(what="first kernel", found=f"ran on {device}")


def _kernels(device: torch.device) -> Iterator[Finding]:
    """Each attention backend against `math` in fp64: forward and backward, shared kv heads, a prefix, a
    window, a soft-cap, segments."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if device.type == "cuda" else [torch.float32]
    few: dict[str, Any] = {} if device.type == "cuda" else {"num_heads": 4, "num_kv_heads": 2}
    sizes = (512, 1024) if device.type == "cuda" else (48, 80)
    for backend in BACKENDS:
        for dtype in dtypes:
            q_TND = torch.empty((1, 1, 128), dtype=dtype, device=device)
            name = f"{backend.name}, {str(dtype).removeprefix('torch.')}"
            taken, why_not = [], None
            for case in cases(*sizes, **few):
                reason = backend.why_not(q_TND.new_empty((1, 1, case.head_dim)), case.variant)
                why_not = why_not or reason
                taken += [] if reason else [case]
            if taken:
                yield _checked(name, partial(_kernel, backend, name, taken, device, dtype))
            elif dtype == dtypes[0]:
                yield Finding(what=name, found=f"not here: {why_not}")


def _kernel(backend: Any, name: str, taken: list[Case], device: torch.device, dtype: torch.dtype) -> Finding:
    found = {case.case: errors(backend, case, str(device), dtype) for case in taken}
    largest = {
        name: max(error if error == error else math.inf for error in of.values())
        for name, of in found.items()
    }
    of_case = max(largest, key=lambda name: largest[name])
    told = f"{len(taken)} cases, off by {largest[of_case]:.0e} at most ({of_case})"
    if largest[of_case] <= LARGEST_ERROR[dtype]:
        return Finding(what=name, found=told)
    instead = "" if isinstance(backend, MathBackend) else "; write attention: math, which is slow, meanwhile"
    return Finding(what=name, found=told, to_do=f"wrong results on this machine: send this in{instead}")


def _gradients(device: torch.device) -> Finding:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = _SMALL_LAYER.model(str(device), dtype)
    batch = {"input_ids": _SMALL_LAYER.tokens(str(device))}
    result = check_gradients(model, batch, ChunkConfig(chunk_size=_SMALL_LAYER.chunk_size))
    exact = "" if result.exact is None else f", {result.exact.largest:.0e} in the wider dtype"
    found = f"chunked {result.chunked.overall:.0e}, plain {result.plain.overall:.0e} from the truth{exact}"
    wrong = "" if result.passed else "chunked gradients are wrong here: send this in"
    return Finding(what="gradients", found=found, to_do=wrong)


def _pinned(device: torch.device) -> Finding:
    if device.type == "cpu":
        return Finding(what="pinned memory", found="not needed without a GPU")
    copies = Copies(device, on_stream=True)
    begun = time.perf_counter()
    block: Block = copies.allocate(_PINNED_BYTES, fake=False)
    pinned_s = time.perf_counter() - begun
    x = torch.arange(_PINNED_BYTES // 8, device=device).view(torch.uint8)
    back = torch.zeros_like(x)

    def there_and_back() -> None:
        copies.run(block.memory, x)
        copies.run(back, block.memory)
        copies.wait_all()

    rate = 2 * _PINNED_BYTES / cost_of(there_and_back).wall_s
    if not torch.equal(x, back):
        return Finding(what="pinned memory", found="copies differ", to_do="write chunk_offload: none")
    told = f"{gib(_PINNED_BYTES)} pinned in {pinned_s:.2f} s, copied at {rate / 2**30:.1f} GiB/s"
    return Finding(what="pinned memory", found=told)


def _speed(device: torch.device) -> Finding:
    """Forward and backward of one layer, chunked."""
    is_gpu = device.type == "cuda"
    sizes, dtype = (_LAYER, torch.bfloat16) if is_gpu else (_SMALL_LAYER, torch.float32)
    model = chunk_model(sizes.model(str(device), dtype), ChunkConfig(chunk_size=sizes.chunk_size))
    ids = sizes.tokens(str(device))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    seconds = cost_of(step).wall_s
    flops, peak = StepFlops.of(model).step([sizes.num_tokens]) / seconds, matmul_flops(str(device), dtype)
    told = f"{sizes.num_tokens:,} tokens in {seconds * 1e3:.0f} ms, {flops / 1e12:.2g} TFLOP/s"
    return Finding(what="a layer's speed", found=f"{told}, {flops / peak:.0%} of a matrix product's")


def _plan(device: torch.device) -> Finding:
    """The plan of Llama-3-8B with LoRA on this card."""
    if device.type == "cpu":
        return Finding(what="plan", found="without a GPU: `chunkdist plan CONFIG --card NAME`")
    with torch.device("meta"):
        model = SIZES["8b"].model("meta", torch.bfloat16)
    sizes = ModelSizes.for_config(model, _AUTO, device_type="cuda")
    job = Job(
        sizes=sizes,
        flops=StepFlops.of(model),
        card=card_of(device),
        available_bytes=int(free_bytes(device) * USABLE_SHARE["cuda"]),
        host_bytes=int(free_host_bytes() * USABLE_SHARE["cpu"]),
        optimizer="adamw_torch",
    )
    longest = f"at most {longest_length(job, _AUTO):,} tokens fit"
    try:
        plan = plan_step(job, _AUTO, _PLANNED_TOKENS)
    except NothingFits:
        return Finding(what="plan", found=f"Llama-3-8B, LoRA: {longest}")
    chosen = (
        f"chunks of {plan.config.chunk_size}, layers_per_group {plan.config.layers_per_group}, "
        f"{plan.config.retained_chunks} retained, offload {plan.config.offload}"
    )
    told = f"Llama-3-8B, LoRA, {_PLANNED_TOKENS:,} tokens: {chosen}, about {plan.time.seconds:.0f} s a step"
    return Finding(what="plan", found=f"{told}; {longest}")
