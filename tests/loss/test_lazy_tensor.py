"""`outputs.logits` of a chunked model with labels: from outside the plain model's, or an error."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn import functional as F
from transformers.trainer_pt_utils import nested_detach

from chunkdist import ChunkConfig, chunk_model
from chunkdist.loss.lazy_tensor import LazyLogits
from tests.helpers.models import VOCAB_SIZE, batch, tiny_llama, with_lora

INPUTS = {**batch(num_rows=2, num_tokens=21), "use_cache": False}


def plain(**settings: Any) -> Any:
    return tiny_llama(num_layers=1, **settings)


def chunked(**settings: Any) -> Any:
    return chunk_model(plain(**settings), ChunkConfig(chunk_size=8))


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB_SIZE), INPUTS["labels"][:, 1:].reshape(-1))


def both(use: Callable[[Any, Any], Tensor], **settings: Any) -> None:
    """What `use(model, outputs)` returns, and the gradients of its sum, must be the plain model's."""
    found = []
    for model in (plain(**settings), chunked(**settings)):
        value = use(model, model(**INPUTS))
        value.sum().backward()
        found.append((value.detach(), [p.grad for p in model.parameters()]))
    (want, gradients), (have, of_chunks) = found
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-10)
    for mine, theirs in zip(of_chunks, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def index_put(model: Any, outputs: Any) -> Tensor:
    outputs.logits[..., 50:] = -1e4
    return loss_of(outputs.logits)


def in_place(model: Any, outputs: Any) -> Tensor:
    outputs.logits.div_(0.5)
    return loss_of(outputs.logits)


def augmented(model: Any, outputs: Any) -> Tensor:
    outputs.logits /= 0.5
    return loss_of(outputs.logits)


def masked_fill(model: Any, outputs: Any) -> Tensor:
    outputs.logits.masked_fill_(torch.arange(VOCAB_SIZE) > 50, -1e4)
    return loss_of(outputs.logits)


def out_argument(model: Any, outputs: Any) -> Tensor:
    with torch.no_grad():
        torch.mul(outputs.logits, 2.0, out=outputs.logits.detach())
    return loss_of(outputs.logits)


def written_through_a_name_for_the_same(model: Any, outputs: Any) -> Tensor:
    same = outputs["logits"].to(torch.float64)  # which the model is in
    same.mul_(2.0)
    outputs.logits.detach().add_(1.0)
    return loss_of(outputs.to_tuple()[1]).reshape(1) + outputs[1].sum()


def read_before_it_is_written(model: Any, outputs: Any) -> Tensor:
    before = outputs.logits.float()
    outputs.logits.zero_()
    return before.double() + outputs.logits


def gradient_of_the_logits(model: Any, outputs: Any) -> Tensor:
    outputs.logits.retain_grad()
    loss_of(outputs.logits).backward(retain_graph=True)
    gradient: Tensor = outputs.logits.grad.clone()
    return gradient + 0 * outputs.logits


def looked_at_without_gradients_first(model: Any, outputs: Any) -> Tensor:
    with torch.no_grad():
        accuracy = (outputs.logits.argmax(-1) == INPUTS["labels"]).float().mean()
    return outputs.loss + loss_of(outputs.logits) * accuracy


def a_loss_of_both(model: Any, outputs: Any) -> Tensor:
    entropy = -(outputs.logits.softmax(-1) * outputs.logits.log_softmax(-1)).sum(-1).mean()
    return outputs.loss - 0.1 * entropy


@pytest.mark.parametrize(
    "use",
    [
        index_put, in_place, augmented, masked_fill, out_argument, written_through_a_name_for_the_same,
        read_before_it_is_written, gradient_of_the_logits, looked_at_without_gradients_first, a_loss_of_both,
    ],
)  # fmt: skip
def test_they_are_the_plain_models(use: Callable[[Any, Any], Tensor]) -> None:
    both(use)


def test_writes_in_the_models_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Chameleon's, which forbids its image tokens before it computes the loss."""

    def forward(self: Any, input_ids: Tensor, labels: Tensor, use_cache: bool) -> Any:
        hidden = self.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        logits = self.lm_head(hidden)
        logits[:, :, 50:] = -1e4
        loss = self.loss_function(logits, labels.clamp(max=49), self.vocab_size)
        return type("Outputs", (), {"loss": loss, "logits": logits})

    monkeypatch.setattr(type(plain()), "forward", forward)
    both(lambda model, outputs: outputs.loss)


def test_reading_what_it_is_makes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = chunked()(**INPUTS).logits
    with monkeypatch.context() as patched:
        patched.setattr(LazyLogits, "materialize", lambda self: pytest.fail("all logits exist"))
        assert isinstance(logits, torch.Tensor)
        assert (logits.shape, logits.dtype, logits.ndim) == ((2, 21, VOCAB_SIZE), torch.float64, 3)
        assert (logits.size(-1), len(logits), logits.device.type) == (VOCAB_SIZE, 2, "cpu")
        assert logits.requires_grad
        assert not logits.is_leaf
        assert not logits.detach().requires_grad
        assert logits.float().dtype == torch.float32
        assert logits.to(torch.float64) is logits
        with torch.no_grad():
            logits.clone()  # DDP does
    assert chunked()(input_ids=INPUTS["input_ids"]).logits.__class__ is not LazyLogits
    with torch.no_grad():
        assert not chunked()(**INPUTS).logits.requires_grad


def test_what_trainers_and_files_do_with_them() -> None:
    model, truth = chunked(), plain()(**INPUTS).logits.detach()

    def fresh() -> Any:
        return model(**INPUTS).logits

    stored = io.BytesIO()
    torch.save(fresh().detach(), stored)
    stored.seek(0)
    accelerator = Accelerator(cpu=True)
    for found in (
        torch.load(stored, weights_only=True),
        copy.deepcopy(fresh().detach()),
        accelerator.gather(fresh().detach()),
        nested_detach((fresh(),))[0],
        fresh().detach().numpy(),
        torch.tensor(fresh().tolist(), dtype=torch.float64),
        torch.cat([fresh()[:1], fresh()[1:]]),
    ):
        torch.testing.assert_close(torch.as_tensor(found), truth)
    assert not nested_detach(fresh()).sum().requires_grad
    assert torch.equal(fresh().argmax(-1), truth.argmax(-1))
    logits = fresh()
    assert torch.equal(logits, logits.detach())
    assert logits.data_ptr() == logits.detach().data_ptr() == logits.data_ptr()


def step(model: Any) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def step_on_data(model: Any) -> None:
    for p in model.parameters():
        p.data -= 0.1 * p.grad


def load(model: Any) -> None:
    model.load_state_dict(plain(seed=3).state_dict())


def new_head(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)


@pytest.mark.parametrize("change", [step, step_on_data, load, new_head])
@pytest.mark.parametrize("detached", [False, True])
def test_they_belong_to_the_weights_of_their_forward(change: Callable[[Any], None], detached: bool) -> None:
    model = chunked()
    outputs, read = (model(**INPUTS) for _ in range(2))
    logits = outputs.logits.detach() if detached else outputs.logits
    truth = read.logits.detach().clone()
    outputs.loss.backward()
    change(model)
    with pytest.raises(RuntimeError, match=r"read outputs\.logits before"):
        logits.argmax(-1)
    torch.testing.assert_close(read.logits, truth)  # made in time


def test_they_can_be_read_after_the_backward() -> None:
    model, truth = chunked(), plain()(**INPUTS).logits
    outputs = model(**INPUTS)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits, truth)


class Reversed(torch.autograd.Function):
    """Passes on what it gets, its gradient with another sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Squared(torch.autograd.Function):
    """Of the user's own, with values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@pytest.mark.parametrize("function", [Reversed, Squared])
def test_functions_that_torch_cannot_see_into(function: Any) -> None:
    with pytest.raises(RuntimeError, match=r"write outputs.logits.clone\(\)"):
        function.apply(chunked()(**INPUTS).logits).sum().backward()
    both(lambda model, outputs: function.apply(outputs.logits.clone()).sum())


@pytest.mark.parametrize(
    "wait",
    [
        lambda outputs: outputs.logits.retain_grad(),
        lambda outputs: outputs.logits.register_hook(lambda gradient: None),
        lambda outputs: torch.autograd.grad(
            outputs.loss, outputs.logits, allow_unused=True, retain_graph=True
        ),
    ],
)
def test_a_gradient_of_the_loss_that_never_passes_them(wait: Callable[[Any], object]) -> None:
    """The plain model's loss is computed from its logits, so they have one."""
    model = chunked()
    outputs = model(**INPUTS)
    with pytest.raises(RuntimeError, match="without the logits"):  # noqa: PT012
        wait(outputs)  # torch.autograd.grad is refused at once, a backward comes later
        outputs.loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_accelerate_takes_its_own_wrapper_off_and_not_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chunked(dtype=torch.float32)
    truth = plain(dtype=torch.float32)(**INPUTS).loss
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    assert prepared(**INPUTS).logits.dtype == torch.float32
    again = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    monkeypatch.setattr(LazyLogits, "materialize", lambda self: pytest.fail("all logits exist"))
    outputs = again(**INPUTS)
    assert isinstance(outputs.logits, LazyLogits)
    torch.testing.assert_close(outputs.loss, truth)


def test_a_copy_of_the_output_layer_that_is_switched_off() -> None:
    """PEFT's `modules_to_save`: with the adapter off, the original is called."""
    settings: dict[str, Any] = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    expected, model = with_lora(plain(), **settings), with_lora(plain(), **settings)
    chunk_model(model, ChunkConfig(chunk_size=8))
    for one in (expected, model):
        with torch.no_grad():
            for p in one.base_model.model.lm_head.modules_to_save.parameters():
                p.mul_(3)
    for one in (expected, model):
        one.outputs = [one(**INPUTS)]
        with one.disable_adapter():
            one.outputs.append(one(**INPUTS))
    assert all(isinstance(outputs.logits, LazyLogits) for outputs in model.outputs)
    for found, truth in zip(model.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(found.loss, truth.loss)
    torch.testing.assert_close(model.outputs[0].logits, expected.outputs[0].logits)
    with pytest.raises(RuntimeError, match="another output layer has become active"):
        model.outputs[1].logits.sum()
