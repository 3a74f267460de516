"""What shared prefixes save: kernel FLOPs and CPU time of a training step, chunked without sharing and with.

    python docs/studies/shared_prefixes.py            # a few minutes on one thread

A tiny Llama (four layers, hidden size 128, fp32), chunks of 512 tokens, one forward and backward. Case
"completions": a prompt of 4,096 tokens with 8 completions of 128; case "pairs": the same prompt with 2. Only
completions have labels. Prints a line of JSON a case: tokens that pass and are computed, and both ratios.
FLOPs are those of matrix products and of the attention kernel: rectangles, and halves of causal squares.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from chunkdist import ChunkConfig, chunk_model
from chunkdist.chunking import num_computed

PROMPT_TOKENS, COMPLETION_TOKENS, CHUNK_SIZE = 4096, 128, 512
CASES = {"completions": 8, "pairs": 2}


class Flops(TorchDispatchMode):
    """Counts what torch's operators do."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if "flash_attention_for_cpu" in name:
            is_backward = name.endswith("backward")
            q, k = args[1:3] if is_backward else args[:2]
            place = 7 if is_backward else 4  # dropout before it; defaults are left out
            is_causal = len(args) > place and args[place]
            of_products = 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
            self.total += (5 if is_backward else 2) * of_products // (2 if is_causal else 1)
        elif func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def model_of(share_prefixes: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    settings = ChunkConfig(chunk_size=CHUNK_SIZE, share_prefixes=share_prefixes)
    return chunk_model(LlamaForCausalLM(config).train(), settings)


def rows_of(num_rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 512, (1, PROMPT_TOKENS), generator=generator).expand(num_rows, -1)
    completions = torch.randint(0, 512, (num_rows, COMPLETION_TOKENS), generator=generator)
    ids = torch.cat([prompt, completions], dim=1)
    labels = ids.clone()
    labels[:, :PROMPT_TOKENS] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, rows: dict[str, torch.Tensor]) -> float:
    start = time.process_time()
    model(**rows, use_cache=False).loss.backward()
    return time.process_time() - start


def measured(num_rows: int, share_prefixes: bool) -> tuple[int, int, float]:
    """Tokens computed, FLOPs of matrix products, and the CPU time of the faster of two steps."""
    model, rows = model_of(share_prefixes), rows_of(num_rows)
    with Flops() as flops:
        step(model, rows)
    return num_computed(model), flops.total, min(step(model, rows) for _ in range(2))


def main() -> None:
    torch.set_num_threads(1)
    for name, num_rows in CASES.items():
        passed, all_flops, all_s = measured(num_rows, share_prefixes=False)
        computed, flops, cpu_s = measured(num_rows, share_prefixes=True)
        figures = {
            "case": name,
            "tokens_passed": passed,
            "tokens_computed": computed,
            "flops_ratio": round(flops / all_flops, 3),
            "cpu_time_ratio": round(cpu_s / all_s, 3),
            "cpu_s": [round(all_s, 2), round(cpu_s, 2)],
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
