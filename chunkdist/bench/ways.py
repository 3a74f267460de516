"""The ways of running a training step that are timed beside each other, on one model.

All have the same weights, tokens and tiled loss. On CUDA, the unchunked ones run torch's flash attention,
the kernel of chunkdist's `varlen`; on a CPU, `scaled_dot_product_attention` has the kernel of `cpu_flash`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.nn.attention import SDPBackend, sdpa_kernel

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.bench.paper_loop import KERNEL, paper_step
from chunkdist.lazy_logits import lazy_logits
from chunkdist.model_layers import causal_lm_of

BASELINE = "gradient checkpointing"


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is run.

    Args:
        config: In chunks.
        method: Without `config`: the plain model, Hugging Face's gradient checkpointing, or the paper's loop.
        saved_on_host: With checkpointing: whether what is saved between layers waits in pinned host memory.
        any_kernel: Whether torch chooses the attention kernel on CUDA (cuDNN's, maybe).
        chunk_size: Of the paper's loop.
    """

    name: str
    config: ChunkConfig | None = None
    method: Literal["plain", "checkpointing", "paper"] = "checkpointing"
    saved_on_host: bool = False
    any_kernel: bool = False
    chunk_size: int = 0


def baselines(chunk_size: int, *, on_gpu: bool) -> list[Way]:
    """Those of the protocol; the first one is what ratios are to."""
    ways = [
        Way(name=BASELINE),
        Way(name="plain", method="plain"),
        Way(name=f"{BASELINE}, inputs on the host", saved_on_host=True),
        Way(name="the paper's chunk loop", method="paper", chunk_size=chunk_size),
    ]
    return [*ways, Way(name=f"{BASELINE}, torch's choice of kernel", any_kernel=True)] if on_gpu else ways


def chunked(
    chunk_size: int, *, offload: bool = False, chunk_sizes: Sequence[int] = (), groups: Sequence[int] = ()
) -> list[Way]:
    """The schedules of chunkdist: the usual ones, with other chunk sizes, and groups of so many layers."""

    def way(name: str, size: int = chunk_size, **settings: Any) -> Way:
        return Way(name=name, config=ChunkConfig(chunk_size=size, **settings))

    return [
        way("chunked, K/V kept", rebuild_kv=False),
        way("chunked, K/V rebuilt (default)"),
        way("chunked, one group of all layers", layers_per_group="all"),
        *(way(f"chunked, groups of {num} layers", layers_per_group=num) for num in groups),
        *(way(f"chunked, chunks of {size:,}", size) for size in chunk_sizes if size != chunk_size),
        *([way("chunked, host offload", offload="host")] if offload else []),
    ]


@contextmanager
def prepared(model: Any, way: Way, *, on_gpu: bool) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the model runs as `way` says; gives the step: from ids (1, T) to the loss, gradients added."""
    causal_lm = causal_lm_of(model)

    def step(ids: Tensor) -> Tensor:
        if way.method == "paper" and way.config is None:
            return paper_step(causal_lm, ids, way.chunk_size)
        with save_on_cpu(pin_memory=on_gpu) if way.saved_on_host else ExitStack():
            loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    with ExitStack() as stack:
        if way.config is not None:  # a chunked model has the tiled loss by itself
            chunk_model(model, way.config)
            stack.callback(unchunk_model, model)
        else:
            stack.enter_context(lazy_logits(causal_lm))
            if on_gpu and not way.any_kernel:
                stack.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
            if way.method == "checkpointing":
                set_checkpointing(model, True)
                stack.callback(set_checkpointing, model, False)
            if way.method == "paper":
                causal_lm.set_attn_implementation(KERNEL)
                stack.callback(causal_lm.set_attn_implementation, "sdpa")
        yield step


def set_checkpointing(model: Any, on: bool) -> None:
    """Hugging Face's gradient checkpointing, under the name that this version of transformers has for it."""
    # `activation_*` is new in transformers 5, the old names go with version 6: then this needs no choice
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()
