"""The benchmark of long-tailed data runs in its smallest size; its baselines are what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from chunkdist.bench import long_tail, long_tail_ways
from chunkdist.bench.long_tail_simulation import MOST, fewest_chunks
from chunkdist.bench.long_tail_ways import BASELINE, padded_attention, segment_attention
from chunkdist.data.cost import SequenceCost
from tests.helpers.models import packed_batch, plain_attention
from tests.helpers.tiny_run import ROOT, load_script


def tables_script() -> ModuleType:
    return load_script(ROOT / "docs" / "make_data_tables.py")


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "long-tail.json"
    assert long_tail.main(["--smoke", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    result = json.loads(file.read_text())
    num_tokens = result["data"]["num_tokens"]
    rows = result["summary"]
    assert next(iter(rows)) == BASELINE
    assert rows[BASELINE]["wall_speedup"] == rows[BASELINE]["cpu_speedup"] == 1
    for way, row in rows.items():
        assert way in out
        assert row["largest_gradient_difference"] < 1e-5
        assert row["tokens_computed"] == num_tokens + row["tokens_padded"]
        assert (row["tokens_padded"] > 0) == (way == BASELINE)
    assert rows["token streams, nothing retained"]["tokens_recomputed"] == num_tokens
    assert rows["token streams"]["tokens_recomputed"] == 0
    assert rows[BASELINE]["tokens_recomputed"] == rows[BASELINE]["tokens_computed"]
    simulated = result["simulation"]["rows"]
    assert {row["num_ranks"] for row in simulated} == {8, 64}
    assert all(row["empty_share"] >= row["empty_share_at_best"] >= 0 for row in simulated)
    script = tables_script()
    page = script.page_with_tables("<!-- begin: data figures --> old <!-- end: data figures -->", result)
    assert "old" not in page
    assert all(f"| {way} |" in page for way in rows)
    assert script.page_with_tables(page, result) == page


def test_an_epoch_is_run_once_after_its_longest_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the allocator asks: running it again would take as long."""
    epochs: list[list[int]] = []
    real = long_tail._epoch

    def epoch(model: Any, way: Any, num_items: int) -> Any:
        epochs.append([inputs["input_ids"].numel() for inputs in way.micro_batches])
        return real(model, way, num_items)

    made = long_tail.ways

    def few(*args: Any, **settings: Any) -> list[Any]:
        return [replace(way, micro_batches=way.micro_batches[:2]) for way in made(*args, **settings)[:2]]

    monkeypatch.setattr(long_tail, "ways", few)
    reruns: list[int] = []
    real_cost = long_tail.cost_of
    monkeypatch.setattr(long_tail, "_epoch", epoch)
    monkeypatch.setattr(
        long_tail,
        "cost_of",
        lambda call, *, on_gpu, max_reruns: (
            reruns.append(max_reruns) or real_cost(call, on_gpu=on_gpu, max_reruns=max_reruns)
        ),
    )
    long_tail.measure(
        long_tail_ways.SIZES["smoke"], num_rounds=1, report=lambda line: None, write=lambda result: None
    )
    warm_ups, timed = epochs[: len(epochs) // 2], epochs[len(epochs) // 2 :]
    assert warm_ups == [[max(sizes)] for sizes in timed]
    assert any(sizes[0] < max(sizes) for sizes in timed)
    assert set(reruns) == {0}


def test_the_committed_result_holds_what_is_claimed() -> None:
    """Even to 5 %, and less than 1 % of the slots empty in chunks of up to 1,536 tokens; of 256 sequences on
    64 ranks, no assignment has so few in larger ones."""
    simulation = tables_script().required("long-tail-cpu")["simulation"]
    assert simulation["assign_4096_to_512_s"] < 1
    for row in simulation["rows"]:
        assert row["num_batches"] == (48 if row["batch_sequences"] == 2048 else 390)
        assert row["largest_over_bound"] <= MOST + 1e-9
        assert row["largest_imbalance"] is None or row["largest_imbalance"] <= MOST + 1e-9
        assert row["empty_share"] >= row["empty_share_at_best"]
        if row["chunk_size"] <= 1536:
            assert row["empty_share"] < 0.01
        elif (row["num_ranks"], row["batch_sequences"]) == (64, 256):
            assert row["empty_share_at_best"] > 0.01
    for num_ranks in (8, 64):
        assert any(row["num_even"] > 40 for row in simulation["rows"] if row["num_ranks"] == num_ranks)


class TestFewestChunks:
    cost = SequenceCost(per_token=1.0)

    def fewest(self, lengths: list[int], num_ranks: int, most: float = 1.0) -> int:
        return fewest_chunks(lengths, self.cost, num_ranks=num_ranks, chunk_size=4, most=most)

    def test_by_hand(self) -> None:
        assert self.fewest([4, 4, 4, 4], 2) == 4
        assert self.fewest([9, 1, 1, 1], 2) == 4, "nothing may be added to the 9 tokens: 3 chunks, and 1"
        assert self.fewest([9, 1, 1, 1], 2, most=12 / 9) == 3
        assert self.fewest([3] * 4, 2) == 4, "6 tokens a rank: 2 full chunks, 2 that are not"

    def test_no_assignment_is_better(self) -> None:
        """All assignments of a few sequences to two ranks."""
        for lengths in ([7, 5, 3, 2, 1], [10, 2, 2, 2, 1], [6, 6, 1, 1, 1], [9, 8, 3]):
            for most in (1.1, 1.3):
                limit = max(sum(lengths) / 2, *lengths) * most
                found = []
                for picks in product((0, 1), repeat=len(lengths)):
                    tokens = [sum(n for n, p in zip(lengths, picks, strict=True) if p == r) for r in (0, 1)]
                    if max(tokens) <= limit:
                        found.append(sum(-(-n // 4) for n in tokens))
                assert self.fewest(lengths, 2, most) <= min(found)


def test_the_simulation_alone_keeps_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"summary": "measured", "simulation": "old"}))
    assert long_tail.main(["--smoke", "--simulation-only", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["summary"] == "measured"
    assert len(result["simulation"]["rows"]) == 15


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

    monkeypatch.setattr(long_tail_ways.F, "scaled_dot_product_attention", seen)
    q, k, v = torch.randn(3, 1, 2, 12, 8).as_subclass(OnGpu).unbind()
    for given in (
        {"attend": padded_attention},
        {"attend": segment_attention, "position_ids": torch.arange(12)[None]},
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
    found, _ = segment_attention(module, q, k, v, None, position_ids=positions)
    torch.testing.assert_close(found, plain_attention(module, q, k, v, mask, 8**-0.5)[0])
