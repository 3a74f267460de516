"""DPO at Llama-3-8B's geometry, LoRA, two rows of 32,768 tokens: within 23 GiB, by fake tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from trl.trainer.utils import add_fused_lm_head

from chunkdist import ChunkConfig, chunk_model
from chunkdist.chunking import host_memory
from chunkdist.memory.fake_model import fake_model
from chunkdist.memory.live_bytes import LiveBytes
from tests.helpers.row_logits import RowLogits
from tests.memory.test_step_memory import GIB, KIB, llama3_8b, weights_bytes

VOCAB = 128256
NUM_TOKENS = 32 * KIB


@lru_cache
def step_bytes(num_layers: int) -> int:
    """Peak live bytes over the weights, of what TRL's `DPOTrainer` computes in a step with an adapter."""
    mode = FakeTensorMode()
    model: Any = fake_model(lambda: llama3_8b(num_layers), mode).train()
    names = ("log_probs", "entropy", "mean_logits", "is_top1")
    add_fused_lm_head(model.get_base_model(), outputs=names)
    chunk_model(model, ChunkConfig(chunk_size=8 * KIB, attention="varlen", offload="host"))
    with mode:
        ids = torch.zeros((2, NUM_TOKENS), dtype=torch.long)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        live = LiveBytes(exclude=[*model.parameters(), *model.buffers()], host=host_memory(model))
        with live, RowLogits(VOCAB, num_tokens=NUM_TOKENS // 8) as logits:
            outputs = model(**given, fused_lm_head=True)
            with torch.no_grad(), model.disable_adapter():
                reference = model(**given, fused_lm_head=True).log_probs
            chosen, rejected = (outputs.log_probs - reference).sum(1)
            (-F.logsigmoid(0.1 * (chosen - rejected))).backward()
    assert logits.count == 0
    return live.peak_bytes


def test_two_rows_of_32k_tokens_fit_in_23_gib() -> None:
    """A layer more adds nothing on the device: shown on 2 and 3 layers."""
    assert step_bytes(3) == step_bytes(2)
    assert weights_bytes() + step_bytes(2) <= 23 * GIB


if __name__ == "__main__":
    print(f"{(weights_bytes() + step_bytes(2)) / GIB:.2f} GiB")
