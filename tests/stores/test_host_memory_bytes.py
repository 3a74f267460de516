"""Host memory of the offload: what is taken, what is used again, what is given back, what is refused."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from chunkdist import ChunkConfig, chunk_model, unchunk_model
from chunkdist.chunking import host_memory
from chunkdist.stores import host_memory as offload_module
from chunkdist.stores.host_memory import Copies, HostMemory
from tests.helpers.models import batch, gradients, tiny_llama
from tests.stores.test_host_memory import SCHEDULES, chunked, memory_of


class TestMemory:
    def test_what_goes_and_what_stays(self) -> None:
        """Inputs of all groups but the last, in slabs of a chunk; no more in later steps."""
        model = chunk_model(tiny_llama(), ChunkConfig(chunk_size=32, offload="host", keep_attention=False))
        gradients(model, batch(num_tokens=128))
        expected = 3 * 4 * 32 * 32 * 8  # groups, chunks, tokens, hidden size, fp64
        assert memory_of(model).held_bytes == expected
        for num_tokens in (128, 100, 64, 30):
            gradients(model, batch(num_tokens=num_tokens))
        assert memory_of(model).held_bytes == expected
        gradients(model, batch(num_tokens=160))
        assert memory_of(model).held_bytes == expected * 5 // 4

    def test_unchunk_model_gives_it_back(self) -> None:
        model = chunked(tiny_llama(num_layers=2), "host")
        gradients(model, batch())
        pools = list(memory_of(model)._pools.values())
        loss = model(**batch(num_tokens=9), use_cache=False).loss
        unchunk_model(model)
        assert sum(pool.held_bytes for pool in pools) == 2 * 4096, "the graph is alive: two chunks"
        del loss
        assert sum(pool.held_bytes for pool in pools) == 0
        assert host_memory(chunked(model, "none")) is None

    def test_a_copy_of_the_model_has_memory_of_its_own(self) -> None:
        model = chunked(tiny_llama(num_layers=2), "host")
        gradients(model, batch())
        twin = copy.deepcopy(model)
        assert memory_of(twin).held_bytes == 0
        found, expected = gradients(twin, batch()), gradients(model, batch())
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_idle_slabs_of_other_sizes_are_let_go_before_memory_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = HostMemory()
        slab = memory.put(torch.ones(4096, dtype=torch.uint8))
        del slab
        assert memory.held_bytes == 4096
        monkeypatch.setattr(
            offload_module, "free_host_bytes", lambda **_: 2 * (10 * 4096 + 4096 - memory.held_bytes)
        )
        monkeypatch.setattr(offload_module, "_USABLE_SHARE", 0.5)
        memory.put(torch.ones(11 * 4096, dtype=torch.uint8))
        assert memory.held_bytes == 11 * 4096


class TestGuard:
    def test_too_little_is_refused_before_anything_is_allocated(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = chunked(tiny_llama(), "host")
        needed = 3 * 37 * 32 * 8  # groups, tokens, hidden size, fp64
        monkeypatch.setattr(offload_module, "free_host_bytes", lambda **_: int(needed / 0.95) - 10)
        with pytest.raises(RuntimeError, match=r"needs 0.00 GiB more .* write more layers_per_group"):
            gradients(model, batch())
        assert memory_of(model).held_bytes == 0
        monkeypatch.setattr(offload_module, "free_host_bytes", lambda **_: 100 * needed)
        gradients(model, batch())

    def test_kept_keys_and_values_are_part_of_what_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = 3 * 37 * (32 + 32) * 8  # input; two heads of 8, K and V
        for spare, schedule in ((-10, "K/V kept"), (-10 - 3 * 37 * 32 * 8, "SeCO")):
            model = chunked(tiny_llama(), "host", **SCHEDULES[schedule])
            monkeypatch.setattr(
                offload_module, "free_host_bytes", lambda spare=spare, **_: int((needed + spare) / 0.95)
            )
            with pytest.raises(RuntimeError, match="of host memory"):
                gradients(model, batch())
            assert memory_of(model).held_bytes == 0

    def test_memory_that_shrinks_meanwhile_is_refused_slab_by_slab(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free = [10**9, 10**9, 10**9, 0]
        monkeypatch.setattr(offload_module, "free_host_bytes", lambda **_: free.pop(0) if free else 0)
        model = chunked(tiny_llama(), "host")
        with pytest.raises(RuntimeError, match="of host memory"):
            gradients(model, batch())
        gc.collect()
        assert memory_of(model).used_bytes == 0

    def test_the_ranks_of_a_machine_share_what_is_free_at_first(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int | None] = []

        def free(*, num_ranks: int | None) -> int:
            asked.append(num_ranks)
            return 10**9

        monkeypatch.setattr(offload_module, "free_host_bytes", free)
        model = chunked(tiny_llama(num_layers=2), "host")
        gradients(model, batch())
        assert asked[0] is None
        assert set(asked[1:]) == {1}
        asked.clear()
        gradients(model, batch())
        assert not asked, "nothing is allocated"

    def test_memory_that_cannot_be_pinned_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def allocate(self: Copies, num_bytes: int, *, fake: bool) -> None:
            raise RuntimeError("the driver refused to pin 1 MiB of host memory")

        model = chunked(tiny_llama(num_layers=2), "host")
        monkeypatch.setattr(Copies, "allocate", allocate)
        with pytest.raises(RuntimeError, match="refused to pin"):
            gradients(model, batch())
        assert memory_of(model).held_bytes == 0
        monkeypatch.undo()
        gradients(model, batch())
