"""Liger's kernels and its ways of putting them into a model (liger-kernel 0.8.5), written in torch.

As there, backwards write their results over what came in, past autograd's counter of changes; modules get new
methods on the instance, a module of transformers another function, a causal LM a forward whose loss
needs no logits. So what Liger asks of a chunked model is tested where Triton cannot run.
"""

from __future__ import annotations

import sys
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

from chunkdist.models.layers import causal_lm_of

Function: Any = torch.autograd.Function  # untyped calls


class RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return x * rstd * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        grad = grad.contiguous()
        normed, weighted = x * rstd, grad * weight
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad.data.copy_(rstd * (weighted - normed * (weighted * normed).mean(-1, keepdim=True)))
        return grad, grad_weight, None


class SiLUMul(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        grads = grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * F.silu(gate)
        gate.data.copy_(grads[0])
        up.data.copy_(grads[1])
        return gate, up


class Rotary(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(dq, cos, -sin), _rotate(dk, cos, -sin), None, None


def _rotate(x_BNTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In place, in the physical layout."""
    x_BTND = x_BNTD.transpose(1, 2).contiguous()
    first, second = x_BTND.data.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    x_BTND.data.copy_(x_BTND.data * cos[:, :, None] + turned * sin[:, :, None])
    return x_BTND.transpose(1, 2)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1
) -> Any:
    return Rotary.apply(q, k, cos, sin)


def norm_forward(self: Any, hidden: Tensor) -> Any:
    return RMSNorm.apply(hidden, self.weight, self.variance_epsilon)


def mlp_forward(self: Any, x: Tensor) -> Any:
    return self.down_proj(SiLUMul.apply(self.gate_proj(x), self.up_proj(x)))


def lce_forward(
    self: Any,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    skip_logits: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Liger's forward of a causal LM: the weights of the head, not the head, make the loss."""
    hidden = self.model(
        input_ids=input_ids, output_attentions=False, return_dict=True, cache_position=None, **kwargs
    )[0]
    if labels is None:
        return modeling_llama.CausalLMOutputWithPast(logits=self.lm_head(hidden))
    logits = F.linear(hidden, self.lm_head.weight).float()[:, :-1]
    return modeling_llama.CausalLMOutputWithPast(
        loss=F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    )


def cross_entropy_in_place(logits: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Any:
    """Liger's stand-in for `torch.nn.functional.cross_entropy`."""

    class CrossEntropy(Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = logits.detach().clone().requires_grad_()
                loss = _cross_entropy(leaf, labels, ignore_index=ignore_index, reduction=reduction)
            (grad,) = torch.autograd.grad(loss, leaf)
            logits.data.copy_(grad)
            ctx.save_for_backward(logits.detach())
            return loss.detach()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return ctx.saved_tensors[0] * grad  # type: ignore[no-any-return]

    return CrossEntropy.apply(logits)


_cross_entropy = F.cross_entropy


def apply_to(
    model: Any,
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
) -> None:
    """As `_apply_liger_kernel_to_instance(model=..., ...)` for a Llama."""
    if rope:
        modeling_llama.apply_rotary_pos_emb = rotary
    if fused_linear_cross_entropy:
        _bind(model, lce_forward)
    if rms_norm:
        _bind(model.model.norm, norm_forward)
    for layer in model.model.layers:
        if swiglu:
            _bind(layer.mlp, mlp_forward)
        if rms_norm:
            _bind(layer.input_layernorm, norm_forward)
            _bind(layer.post_attention_layernorm, norm_forward)
    if cross_entropy:
        torch.nn.functional.cross_entropy = cross_entropy_in_place  # type: ignore[assignment]


def _bind(module: nn.Module, forward: Any) -> None:
    module.__dict__["forward"] = MethodType(forward, module)
    module.__dict__["_get_name"] = MethodType(lambda self: "LigerStandIn", module)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a package `liger_kernel` of these functions in the place of the real one, for one test."""
    keep_globals(monkeypatch)
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    modules = [ModuleType(name) for name in names]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    modules[-1].__dict__.update(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": apply_to},
        _apply_liger_kernel_to_instance=lambda model, **kwargs: apply_to(causal_lm_of(model), **kwargs),
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def keep_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the test, the globals that `apply_to` replaces are as before."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", torch.nn.functional.cross_entropy)
