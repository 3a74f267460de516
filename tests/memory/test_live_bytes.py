from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from chunkdist.memory.live_bytes import LiveBytes

KIB = 1024


def kib(num_kib: int) -> Tensor:
    return torch.empty(num_kib * KIB, dtype=torch.uint8)


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


@pytest.fixture(params=["real", "fake"])
def in_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "fake":
        with FakeTensorMode():
            yield
    else:
        yield


@pytest.mark.usefixtures("in_mode")
class TestCounts:
    def test_allocations_and_frees(self) -> None:
        with LiveBytes() as live:
            a = kib(3)
            b = kib(5)
            assert live.current_bytes == 8 * KIB
            del a
            assert live.current_bytes == 5 * KIB
            c = kib(1)
            assert (live.current_bytes, live.peak_bytes) == (6 * KIB, 8 * KIB)
            del b, c
        assert (live.current_bytes, live.peak_bytes) == (0, 8 * KIB)

    def test_a_view_is_counted_once_and_keeps_its_storage(self) -> None:
        with LiveBytes() as live:
            a = kib(4)
            views = [a.view(4, KIB)[1], a[5:], a.detach(), a.reshape(2, -1).T]
            assert live.current_bytes == 4 * KIB
            del a
            assert live.current_bytes == 4 * KIB
            del views
            assert live.current_bytes == 0

    def test_in_place_results_are_counted_once(self) -> None:
        with LiveBytes() as live:
            a = kib(4)
            a.add_(1).mul_(2)
            torch.add(a, 1, out=a)
            assert live.peak_bytes == 4 * KIB

    def test_in_place_resize(self) -> None:
        with LiveBytes() as live:
            a = kib(1)
            a.resize_(3 * KIB)
            assert live.current_bytes == 3 * KIB
            del a
            assert live.current_bytes == 0

    def test_a_storage_that_is_emptied(self) -> None:
        """As FSDP2 releases gathered weights: no op follows."""
        real = torch.UntypedStorage.resize_
        with LiveBytes() as live:
            a = kib(2)
            a.untyped_storage().resize_(0)
            assert live.current_bytes == 0
            a.untyped_storage().resize_(2 * KIB)
            assert live.current_bytes == 2 * KIB
        assert torch.UntypedStorage.resize_ is real

    def test_several_outputs(self) -> None:
        with LiveBytes() as live:
            a = kib(4)
            parts = a.split(KIB)  # views
            values, indices = torch.sort(a)  # KiB of values, and as many int64
            assert live.current_bytes == 4 * KIB + 4 * KIB + 8 * 4 * KIB
            del parts, values, indices, a
            assert live.current_bytes == 0

    def test_tensors_freed_after_the_mode_are_taken_off(self) -> None:
        with LiveBytes() as live:
            a = kib(2)
        b = kib(7)  # not seen
        del a
        assert (live.current_bytes, live.peak_bytes) == (0, 2 * KIB)
        del b

    def test_many_addresses_reused(self) -> None:
        with LiveBytes() as live:
            for _ in range(200):
                a = kib(1) + kib(1)
                del a
            assert (live.current_bytes, live.peak_bytes) == (0, 3 * KIB)

    def test_reset_peak_starts_from_what_is_alive(self) -> None:
        with LiveBytes() as live:
            a = kib(2)
            kib(10)
            live.reset_peak()
            assert live.peak_bytes == 2 * KIB
            b = kib(1)
            assert live.peak_bytes == 3 * KIB
            del a, b


@pytest.mark.usefixtures("in_mode")
class TestBaseline:
    def test_older_storages_are_not_counted_passed_or_not(self) -> None:
        passed, met = kib(3), kib(5)
        with LiveBytes(exclude=[passed, passed.view(3, -1)]) as live:
            assert live.baseline_bytes == 3 * KIB
            views = [passed.add_(1), met[1:], met.mul_(2), met.view(5, -1)]
            assert live.baseline_bytes == 8 * KIB
            result = passed + 1
            assert live.current_bytes == 3 * KIB
            del views, result, met
            assert (live.current_bytes, live.baseline_bytes) == (0, 3 * KIB)

    def test_weights_are_baseline_and_their_gradients_are_not(self) -> None:
        model = tiny_llama()
        weight_bytes = sum(p.nbytes for p in model.parameters())
        ids = torch.zeros(1, 16, dtype=torch.long)
        with LiveBytes(exclude=model.parameters()) as live:
            model(ids, labels=ids, use_cache=False).loss.backward()
        assert weight_bytes <= live.baseline_bytes <= weight_bytes + 4 * KIB  # and inv_freq, ids
        assert live.current_bytes == weight_bytes  # the gradients
        model.zero_grad()
        assert live.current_bytes == 0


class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x * 2)
        ctx.extra = x * 3
        return x + 1

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        return grad * saved * ctx.extra


@pytest.mark.usefixtures("in_mode")
class TestAutograd:
    def test_what_a_custom_function_saves_lives_until_its_backward(self) -> None:
        x = torch.empty(KIB, requires_grad=True)
        with LiveBytes(exclude=[x]) as live:
            loss = Keep.apply(x).sum()
            assert live.current_bytes == 8 * KIB + 4  # two saved tensors, the sum; the output was not saved
            loss.backward()
            assert live.peak_bytes > 8 * KIB + 4
            del loss
            assert live.current_bytes == 4 * KIB  # x.grad

    def test_checkpoint_keeps_inputs_only(self) -> None:
        def block(x: Tensor) -> Tensor:
            for _ in range(10):
                x = (x * 2).exp()
            return x

        def alive_before_backward(run: Callable[[Tensor], Tensor]) -> int:
            x = torch.zeros(KIB, requires_grad=True)
            with LiveBytes(exclude=[x]) as live:
                loss = run(x).sum()
                alive = live.current_bytes
                loss.backward()
            return alive

        # the plain graph keeps ten outputs of exp (the loss's backward needs no values)
        assert alive_before_backward(block) == 10 * 4 * KIB + 4
        assert alive_before_backward(lambda x: checkpoint(block, x, use_reentrant=False)) <= 4 * KIB + 4


def test_fake_and_real_tensors_count_the_same() -> None:
    def peak() -> int:
        model = tiny_llama()
        ids = torch.zeros(1, 64, dtype=torch.long)
        with LiveBytes(exclude=model.parameters()) as live:
            model(ids, labels=ids, use_cache=False).loss.backward()
        return live.peak_bytes

    real = peak()
    with FakeTensorMode():
        fake = peak()
    assert fake == real


def test_the_order_of_the_modes_does_not_matter() -> None:
    fake = FakeTensorMode()
    with fake, LiveBytes() as inside:
        a = torch.empty(KIB) + torch.empty(KIB)
    with LiveBytes() as outside, fake:
        b = torch.empty(KIB) + torch.empty(KIB)
    assert inside.peak_bytes == outside.peak_bytes == 12 * KIB
    assert inside.current_bytes == outside.current_bytes == 4 * KIB
    del a, b


def test_an_exception_leaves_no_mode_behind() -> None:
    with pytest.raises(KeyError), LiveBytes() as live:
        raise KeyError
    a = kib(1)
    assert live.current_bytes == 0
    del a
