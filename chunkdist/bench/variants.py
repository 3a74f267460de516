"""The variants of a training step that are timed beside each other, on one model.

All have the same weights, tokens and tiled loss. On CUDA, the unchunked ones run torch's flash attention,
the kernel of chunkdist's `varlen`; on a CPU, `scaled_dot_product_attention` has the kernel of `cpu_flash`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.bench.kernels import PREFIX
from chunkdist.bench.models import set_checkpointing
from chunkdist.bench.paper_loop import paper_step
from chunkdist.config import AUTO_FIELDS
from chunkdist.loss.lazy_logits import lazy_logits
from chunkdist.models.layers import causal_lm_of

BASELINE = "gradient checkpointing"
CHOICE = f"{BASELINE}, torch's choice of kernel"
ON_HOST = f"{BASELINE}, inputs on the host"
SELECTIVE = "selective checkpointing (keeps attention's outputs)"
KEPT = "chunked, K/V kept"
REBUILT = "chunked, K/V rebuilt (default)"
ONE_GROUP = "chunked, one group of all layers"
OFFLOADED = "chunked, host offload"
TWICE = "chunked, K/V rebuilt, attention forward run twice"
PLANNED = "chunked, as planned (auto)"

_aten = torch.ops.aten
_ATTENTION = [_aten._scaled_dot_product_flash_attention_for_cpu.default]
_ATTENTION += [getattr(_aten, f"_scaled_dot_product_{name}_attention").default for name in ("flash", "cudnn")]
_SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a step is run.

    Args:
        config: How it is chunked; `None`: it is not.
        method: Without `config`: the plain model, Hugging Face's gradient checkpointing, the same with what
            attention returns kept (torch's selective checkpointing), or the paper's loop.
        saved_on_host: With checkpointing: whether the inputs of layers wait in pinned host memory.
        kernel: The kernel of attention on CUDA, unchunked; "any": torch chooses.
        chunk_size: Tokens of a chunk in the paper's loop.
    """

    name: str
    config: ChunkConfig | None = None
    method: Literal["plain", "checkpointing", "selective", "paper"] = "checkpointing"
    saved_on_host: bool = False
    kernel: Literal["flash", "cudnn", "any"] = "flash"
    chunk_size: int = 0

    @property
    def begins_slowly(self) -> bool:
        """Whether the first step after each `prepared` plans, or pins the host's memory."""
        return self.config is not None and (self.config.has_auto or self.config.offload == "host")


def baselines(chunk_size: int, *, on_gpu: bool) -> list[Variant]:
    """The baselines of the protocol; the first one is what ratios are to."""
    found = [
        Variant(name=BASELINE),
        Variant(name="plain", method="plain"),
        Variant(name=SELECTIVE, method="selective"),
        Variant(name=ON_HOST, saved_on_host=True),
        Variant(name="the paper's chunk loop", method="paper", chunk_size=chunk_size),
    ]
    return [*found, Variant(name=CHOICE, kernel="any")] if on_gpu else found


def chunked(
    chunk_size: int, offload: bool = False, chunk_sizes: Sequence[int] = (), groups: Sequence[int] = ()
) -> list[Variant]:
    """The schedules of chunkdist: the usual ones, the planner's for the memory there is, with other chunk
    sizes, and with groups of so many layers."""

    def variant(name: str, size: int = chunk_size, **settings: Any) -> Variant:
        settings = {"chunk_size": size, "keep_attention": True, **settings}
        return Variant(name=name, config=ChunkConfig(**settings))

    auto: Any = dict.fromkeys(AUTO_FIELDS, "auto")
    return [
        variant(KEPT, rebuild_kv=False),
        variant(REBUILT),
        variant(TWICE, keep_attention=False),
        variant(ONE_GROUP, layers_per_group="all"),
        Variant(name=PLANNED, config=ChunkConfig(**auto)),
        *(variant(f"chunked, groups of {num} layers", layers_per_group=num) for num in groups),
        *(variant(f"chunked, chunks of {size:,}", size) for size in chunk_sizes if size != chunk_size),
        *([variant(OFFLOADED, offload="host")] if offload else []),
    ]


EXTRAS = ("bf16-kv-grads", "varlen", "flash_attn", "cudnn")
"""K/V gradients summed in bf16, and attention backends. The kernel that is new to us is last: an illegal
access there loses what follows."""


def extras(names: Sequence[str], chunk_size: int, *, on_gpu: bool) -> list[Variant]:
    """The fastest chunked variant, and the baseline where it concerns that, with the named changes; "all":
    with those that this machine has what they need for."""
    if "all" in names:
        names = [name for name in EXTRAS if name != "flash_attn" or find_spec(name)] if on_gpu else EXTRAS[:1]
    kept, found = ChunkConfig(chunk_size=chunk_size, rebuild_kv=False, keep_attention=True), []
    for name in names:
        label = "narrow K/V gradients" if name == EXTRAS[0] else f"attention {name}"
        if name == "cudnn":
            found.append(Variant(name=f"{BASELINE}, {label}", kernel="cudnn"))
        change: dict[str, Any] = {"kv_grad_dtype": None} if name == EXTRAS[0] else {"attention": name}
        found.append(Variant(name=f"{KEPT}, {label}", config=replace(kept, **change)))
    return found


@contextmanager
def prepared(model: Any, variant: Variant, *, on_gpu: bool) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the model runs as `variant` says; gives the step, from ids (1, T) to the loss, which adds
    gradients."""
    causal_lm = causal_lm_of(model)

    def step(ids: Tensor) -> Tensor:
        if variant.method == "paper" and variant.config is None:
            return paper_step(causal_lm, ids, variant.chunk_size)
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    with ExitStack() as stack:
        if variant.config is not None:  # a chunked model has the tiled loss by itself
            chunk_model(model, variant.config)
            stack.callback(unchunk_model, model)
        else:
            stack.enter_context(lazy_logits(causal_lm))
            if on_gpu and variant.kernel != "any":
                stack.enter_context(sdpa_kernel(_SDPA[variant.kernel]))
            if variant.method in ("checkpointing", "selective"):
                contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _ATTENTION)}
                set_checkpointing(model, True, **(contexts if variant.method == "selective" else {}))
                stack.callback(set_checkpointing, model, False)
                if variant.saved_on_host:
                    stack.enter_context(_inputs_on_host(model, pin_memory=on_gpu))
            if variant.method == "paper":
                causal_lm.set_attn_implementation(PREFIX)
                stack.callback(causal_lm.set_attn_implementation, "sdpa")
        yield step


@contextmanager
def _inputs_on_host(model: Any, *, pin_memory: bool) -> Iterator[None]:
    """What checkpoints keep waits on the host, and nothing else: `save_on_cpu` around the whole model would
    move what the norms and the loss save, the head's weight too."""
    modules = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
    functions = [module._gradient_checkpointing_func for module in modules]

    def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint(*args: Any, **kwargs: Any) -> Any:
            with save_on_cpu(pin_memory=pin_memory):  # of what runs inside, checkpointing saves nothing
                return function(*args, **kwargs)

        return checkpoint

    for module, function in zip(modules, functions, strict=True):
        module._gradient_checkpointing_func = on_host(function)
    try:
        yield
    finally:
        for module, function in zip(modules, functions, strict=True):
            module._gradient_checkpointing_func = function
