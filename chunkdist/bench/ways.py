"""The ways of running a training step that are timed beside each other, on one model.

All have the same weights, tokens and tiled loss. On CUDA, the unchunked ones run torch's flash attention,
the kernel of chunkdist's `varlen`; on a CPU, `scaled_dot_product_attention` has the kernel of `cpu_flash`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.nn.attention import SDPBackend, sdpa_kernel

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.bench.fused import fused
from chunkdist.bench.paper_loop import KERNEL, paper_step
from chunkdist.config import ATTENTION_NAMES
from chunkdist.loss.lazy_logits import lazy_logits
from chunkdist.models.layers import causal_lm_of

BASELINE = "gradient checkpointing"
CHOICE = f"{BASELINE}, torch's choice of kernel"
ON_HOST = f"{BASELINE}, inputs on the host"
KEPT = "chunked, K/V kept"
REBUILT = "chunked, K/V rebuilt (default)"
OFFLOADED = "chunked, host offload"
PLANNED = "chunked, as planned (auto)"

_SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is run.

    Args:
        config: In chunks.
        method: Without `config`: the plain model, Hugging Face's gradient checkpointing, or the paper's loop.
        saved_on_host: With checkpointing: whether the inputs of layers wait in pinned host memory.
        kernel: Of attention on CUDA, unchunked; "any": torch chooses.
        chunk_size: Of the paper's loop.
        around: Of the model, what it runs in: with other parts, say. It is entered before the model is
            chunked, and left after.
    """

    name: str
    config: ChunkConfig | None = None
    method: Literal["plain", "checkpointing", "paper"] = "checkpointing"
    saved_on_host: bool = False
    kernel: Literal["flash", "cudnn", "any"] = "flash"
    chunk_size: int = 0
    around: Callable[[Any], AbstractContextManager[Any]] | None = None

    @property
    def begins_slowly(self) -> bool:
        """Whether the first step after each `prepared` is slower: it compiles, plans, or pins the host's
        memory."""
        if self.config is None:
            return self.around is not None
        return self.around is not None or self.config.has_auto or self.config.offload == "host"


def baselines(chunk_size: int, *, on_gpu: bool) -> list[Way]:
    """Those of the protocol; the first one is what ratios are to."""
    ways = [
        Way(name=BASELINE),
        Way(name="plain", method="plain"),
        Way(name=ON_HOST, saved_on_host=True),
        Way(name="the paper's chunk loop", method="paper", chunk_size=chunk_size),
    ]
    return [*ways, Way(name=CHOICE, kernel="any")] if on_gpu else ways


def chunked(
    chunk_size: int, *, offload: bool = False, chunk_sizes: Sequence[int] = (), groups: Sequence[int] = ()
) -> list[Way]:
    """The schedules of chunkdist: the usual ones, the planner's for the memory there is, with other chunk
    sizes, and groups of so many layers."""

    def way(name: str, size: int | Literal["auto"] = chunk_size, **settings: Any) -> Way:
        return Way(name=name, config=ChunkConfig(chunk_size=size, **settings))

    return [
        way(KEPT, rebuild_kv=False),
        way(REBUILT),
        way("chunked, one group of all layers", layers_per_group="all"),
        way(PLANNED, "auto", layers_per_group="auto", retained_chunks="auto", offload="auto"),
        *(way(f"chunked, groups of {num} layers", layers_per_group=num) for num in groups),
        *(way(f"chunked, chunks of {size:,}", size) for size in chunk_sizes if size != chunk_size),
        *([way(OFFLOADED, offload="host")] if offload else []),
    ]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What may be changed in a way.

    Args:
        label: What its name gets.
        config: Fields of `ChunkConfig`, of chunked ways.
        kernel: As in `Way`, of unchunked ones.
        around: As in `Way`, of both.
        needs: A package.
        on_gpu_only: Not on a CPU.
    """

    label: str
    config: dict[str, Any] = field(default_factory=dict)
    kernel: Literal["cudnn"] | None = None
    around: Callable[[Any], AbstractContextManager[Any]] | None = None
    needs: str | None = None
    on_gpu_only: bool = False

    def is_for(self, *, on_gpu: bool) -> bool:
        """Whether this machine has what it needs."""
        has_package = self.needs is None or importlib.util.find_spec(self.needs) is not None
        return has_package and (on_gpu or not self.on_gpu_only)

    def of(self, way: Way) -> Way | None:
        """`way` with it; `None` where it changes nothing."""
        name = f"{way.name}, {self.label}"
        if way.config is not None and (self.config or self.around):
            return replace(way, name=name, config=replace(way.config, **self.config), around=self.around)
        if way.config is None and (self.kernel or self.around):
            return replace(way, name=name, kernel=self.kernel or way.kernel, around=self.around)
        return None


_KERNELS = {
    name: Variant(
        label=f"attention {name}",
        config={"attention": name},
        kernel="cudnn" if name == "cudnn" else None,
        needs="flash_attn" if name == "flash_attn" else None,
        on_gpu_only=True,
    )
    for name in map(str, ATTENTION_NAMES)
    if name not in ("auto", "math", "cpu_flash")
}
VARIANTS: dict[str, Variant] = {
    **{name: variant for name, variant in _KERNELS.items() if name != "cudnn"},
    "bf16-kv-grads": Variant(label="narrow K/V gradients", config={"kv_grad_dtype": None}),
    "liger": Variant(
        label="Liger", around=partial(fused, kind="liger"), needs="liger_kernel", on_gpu_only=True
    ),
    "compile": Variant(label="compiled", around=partial(fused, kind="compile"), on_gpu_only=True),
    "cudnn": _KERNELS["cudnn"],
}
"""By the name of the option: of the fastest chunked way, and of the baseline where it concerns that. The
kernel that is new to us is last: an illegal access there loses what follows."""


def variants(names: Sequence[str], chunk_size: int, *, on_gpu: bool) -> list[Way]:
    """The named ones; "all": those that this machine has what they need for."""
    if "all" in names:
        names = [name for name, variant in VARIANTS.items() if variant.is_for(on_gpu=on_gpu)]
    fastest = Way(name=KEPT, config=ChunkConfig(chunk_size=chunk_size, rebuild_kv=False))
    found = [VARIANTS[name].of(way) for name in names for way in (Way(name=BASELINE), fastest)]
    return [way for way in found if way is not None]


@contextmanager
def prepared(model: Any, way: Way, *, on_gpu: bool) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the model runs as `way` says; gives the step: from ids (1, T) to the loss, gradients added."""
    causal_lm = causal_lm_of(model)

    def step(ids: Tensor) -> Tensor:
        if way.method == "paper" and way.config is None:
            return paper_step(causal_lm, ids, way.chunk_size)
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    with ExitStack() as stack:
        if way.around is not None:
            stack.enter_context(way.around(model))
        if way.config is not None:  # a chunked model has the tiled loss by itself
            chunk_model(model, way.config)
            stack.callback(unchunk_model, model)
        else:
            stack.enter_context(lazy_logits(causal_lm))
            if on_gpu and way.kernel != "any":
                stack.enter_context(sdpa_kernel(_SDPA[way.kernel]))
            if way.method == "checkpointing":
                set_checkpointing(model, True)
                stack.callback(set_checkpointing, model, False)
                if way.saved_on_host:
                    stack.enter_context(_inputs_on_host(model, pin_memory=on_gpu))
            if way.method == "paper":
                causal_lm.set_attn_implementation(KERNEL)
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


def set_checkpointing(model: Any, on: bool) -> None:
    """Hugging Face's gradient checkpointing, under the name that this version of transformers has for it."""
    # `activation_*` is new in transformers 5, the old names go with version 6: then this needs no choice
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()
