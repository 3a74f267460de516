"""The baselines' attention is what it says."""

from __future__ import annotations

import pytest
import torch

from chunkdist.bench import kernels
from chunkdist.bench.kernels import segments, whole
from tests.helpers.models import packed_batch, plain_attention


def test_padded_rows_have_the_flash_kernel_and_no_other_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    allowed: list[dict[str, bool]] = []

    def seen(query: torch.Tensor, *rest: torch.Tensor, is_causal: bool) -> torch.Tensor:
        assert is_causal
        backends = torch.backends.cuda
        names = ("flash", "math", "mem_efficient", "cudnn")
        allowed.append({name: getattr(backends, f"{name}_sdp_enabled")() for name in names})
        return query

    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", seen)
    q, k, v = torch.randn(3, 1, 2, 12, 8).as_subclass(OnGpu).unbind()
    for given in (
        {"attend": whole},
        {"attend": segments, "position_ids": torch.arange(12)[None]},
    ):
        attend = given.pop("attend")
        assert attend(torch.nn.Identity(), q, k, v, None, **given)[0].shape == (1, 12, 2, 8)
        assert allowed.pop() == {"flash": True, "math": False, "mem_efficient": False, "cudnn": False}


def test_segments_of_the_baselines_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 12, 8).unbind()
    positions = packed_batch([5, 1, 6])["position_ids"]
    segment = torch.tensor([0] * 5 + [1] + [2] * 6)
    visible = (segment[:, None] == segment) & (torch.arange(12)[:, None] >= torch.arange(12))
    mask = torch.zeros(1, 1, 12, 12).masked_fill(~visible, -torch.inf)
    module = torch.nn.Identity()
    found, _ = segments(module, q, k, v, None, position_ids=positions)
    torch.testing.assert_close(found, plain_attention(module, q, k, v, mask, 8**-0.5)[0])
