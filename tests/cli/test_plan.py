"""`chunkdist plan` on the quickstart's config: no weights, no data, no GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from chunkdist.bench.models import LLAMA_3_8B
from chunkdist.cli.main import main

LLAMA_8B = {"model_type": "llama", **LLAMA_3_8B}
LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def test_says_where_every_gib_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CONFIG, "--card", "l4", "--length", "2048", "--simulate"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "2,048 tokens",
        "NVIDIA L4, 22.00 GiB",
        "a margin of",
        "group inputs",
        "K/V gradients",
        "as configured: chunk_size: 1024, layers_per_group: 1",
        "longest length that fits",
        "with 1 GiB more",
        "fastest schedule",
        "simulated (1 layers",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("dpo", [], "16,384 tokens, 2 row(s) a micro-batch"),
        ("reward", [], "16,384 tokens, 2 row(s) a micro-batch"),
        (
            "grpo",
            ["--length", "6144"],
            "while it generates: 3.00 GiB of keys and values for 4 rows of 6,144 tokens",
        ),
    ],
)
def test_other_trainers_presets_fit(
    kind: str, more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    config = str(Path(CONFIG).with_name(f"llama3-8b-{kind}-lora-24gb.yaml"))
    given = ["--trainer", kind, "--model_name_or_path", str(tmp_path), *more]
    assert main(["plan", config, *given]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert words in out
    assert "as configured: chunk_size: " in out
    assert "is too much" not in out


def test_a_reference_model_takes_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(CONFIG).with_name("dpo-quickstart.yaml"))
    assert main(["plan", config, "--trainer", "dpo"]) == 0
    assert "reference model" in capsys.readouterr().out
    assert main(["plan", config, "--trainer", "dpo", "--precompute_ref_log_probs", "true"]) == 0
    assert "reference model" not in capsys.readouterr().out


def test_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["plan", CONFIG, "--memory-gib", "1.02", "--host-gib", "0", "--length", "524288"])
    assert status == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "as configured, a step needs" in out
    assert "nothing fits: 524,288 tokens need" in out


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama3-8b-lora-24gb", LLAMA_8B),
        ("llama3-8b-qlora-24gb", LLAMA_8B),
        ("llama3.2-1b-full-24gb", LLAMA_1B),
    ],
)
def test_presets_fit_on_their_card(
    name: str, sizes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of their models' sizes; bitsandbytes need not be there."""
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    config = str(Path(CONFIG).with_name(f"{name}.yaml"))
    assert main(["plan", config, "--model_name_or_path", str(tmp_path)]) == 0
    assert "as configured: chunk_size: " in " ".join(capsys.readouterr().out.split())


def test_the_whole_of_8b_on_one_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """131,072 tokens, at most 120 GiB on the host; the best that others publish is 186 tokens a second."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    configs = Path(CONFIG).parent
    launched = ["--accelerate", str(configs / "accelerate" / "fsdp2-offload.yaml"), "--num-ranks", "1"]
    given = ["--model_name_or_path", str(tmp_path), *launched, "--host-gib", "120"]
    assert main(["plan", str(configs / "llama3-8b-full-24gb.yaml"), *given]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "131,072 tokens" in out
    assert "fsdp2, 1 rank(s)" in out
    assert "as configured: chunk_size: " in out
    assert float(re.search(r"s, ([\d,]+) tokens/s", out)[1].replace(",", "")) >= 186  # type: ignore[index]
    assert float(re.search(r"gathered weights │ +([\d.]+)", out)[1]) <= 0.82  # type: ignore[index]
    assert "over the bus: weights and gradients 28.94 GiB to the card and 14.96 GiB from it" in out


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_million_tokens_on_eight_cards(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The preset fits, in at most 300 s a step: the best that others publish is 364 s."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    config = str(Path(CONFIG).with_name("llama3-8b-1m-8gpu.yaml"))
    card = ["--card", "h100", "--engine", engine, "--num-ranks", "8", "--host-gib", "200"]
    if engine == "zero3":
        card += ["--layers_per_group", "1", "--chunk_keep_attention", "auto"]
    assert main(["plan", config, "--model_name_or_path", str(tmp_path), *card]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1,048,576 tokens" in out
    assert "8 share each row" in out
    assert "as configured: chunk_size: " in out
    seconds, longest = (
        float(re.search(pattern, out)[1].replace(",", ""))  # type: ignore[index]
        for pattern in (r"a step takes about ([\d,.]+) s", r"longest length that fits: ([\d,]+) tokens")
    )
    assert seconds <= (300 if engine == "fsdp2" else 320)
    assert longest >= 5_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--engine", "ddp", "--num-ranks", "8", "--sequence-parallel", "3"],
            "--sequence-parallel 3 with --num-ranks 8: write a multiple of 3",
        ),
        (
            ["--engine", "ddp", "--num-ranks", "8", "--sequence-parallel", "8", "--simulate"],
            "--simulate runs one rank alone, not 8",
        ),
        (["--memory-gib", "0"], "--memory-gib 0.0 plans for nothing"),
        (["--num-ranks", "4"], "--num-ranks 4 without an engine, which is one process"),
        (["--engine", "ddp", "--offload-weights"], "--offload-weights with --engine ddp, which keeps it on"),
        (["--offload-optimizer"], "--offload-optimizer with --engine single"),
        (["--engine", "fsdp2", "--offload-weights"], "write both --offload-weights and --offload-optimizer"),
        (
            ["--engine", "ddp", "--deepspeed", "x.json"],
            "--engine and --deepspeed both say which engine it is",
        ),
        (["--deepspeed", "x.json"], "--deepspeed='x.json' cannot be read"),
        (["--chunk_method", "none"], "has no chunks to plan"),
        (["--chunk_size", "some"], "chunk_size='some' is not a count of tokens"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", CONFIG, *options]) == 2
    assert message in capsys.readouterr().err
