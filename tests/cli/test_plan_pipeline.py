"""What the planner is told of a model, and `chunkdist plan` of a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from chunkdist.cli.main import main
from chunkdist.data.cost import SequenceCost
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.pipeline.costs import layer_costs, room_for_graphs
from chunkdist.train.options.arguments import parse_options
from chunkdist.train.options.combinations import check_options
from chunkdist.train.samples.stream_order import StreamOrder, refuse_other_order
from tests.helpers.models import tiny_llama, with_lora
from tests.helpers.tiny_run import ROOT, make_model_folder, write_rows


def test_layers_and_head_cost_what_the_model_does() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 61,
        "head_dim": 8,
        "sliding_window": 11,
    }
    config = Gemma3TextConfig(
        **sizes,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=kinds,
    )
    model = AutoModelForCausalLM.from_config(config)
    layers, head = layer_costs(model)
    assert head == 6 * 61 * 32
    assert [[window for window, _ in layer.per_pair] for layer in layers] == [[11], [None], [11]]
    for length in (5, 40):
        own = sum(layer(length) for layer in layers) + head * length
        assert own == pytest.approx(SequenceCost.of(model)(length))
    assert len(layer_costs(with_lora(tiny_llama(num_layers=2)))[0]) == 2


def test_room_is_what_the_largest_stage_leaves() -> None:
    """2 layers, and what is outside of layers."""
    model = tiny_llama(num_layers=3)
    sizes = ModelSizes.of(model)
    saved = max(cell.saved.per_token for cell in sizes.cells)
    layer = sum(p.numel() for p in model.model.layers[0].parameters()) * 8
    other = sum(p.numel() for p in model.parameters()) * 8 - 3 * layer
    kv_and_grads = 2 * 2 * 8 * (8 + 8)  # heads, K and V, head dim, in fp64 and their gradients in fp64
    hidden = 3 * 32 * 8
    kv = kv_and_grads // 2
    tile = 12 * sizes.head_tile_tokens * sizes.head_width  # type: ignore[operator]
    there = 2 * (2 * layer + other) + 100 * (2 * (kv + kv_and_grads) + hidden) + tile
    settings = {"num_layers": 2, "longest": 100, "optimizer": "sgd"}
    for tokens, expected in ((0.5, 0), (1.5, 1), (3, 2), (70, 64)):
        available = int(there + tokens * saved)
        assert room_for_graphs(sizes, available_bytes=available, **settings) == expected  # type: ignore[arg-type]
    adam = {**settings, "optimizer": "adamw_torch_fused"}
    available = int(there + 2 * (2 * layer + other) + 3 * saved)
    assert room_for_graphs(sizes, available_bytes=available, **adam) == 2  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a run in 2 stages, everything left to the planner."""
    model = make_model_folder(tmp_path / "model", num_hidden_layers=4)
    rows = [{"text": "x = 1\n" * count} for count in (250, 100, 3, 2)]
    options = {
        "model_name_or_path": str(model),
        "from_scratch": True,
        "dataset_name": str(write_rows(tmp_path / "data.jsonl", rows)),
        "max_length": 2048,
        "output_dir": str(tmp_path / "out"),
        "pipeline_stages": 2,
        "chunk_size": "auto",
        "retained_chunks": "auto",
        "pipeline_forwards_ahead": "auto",
        "per_device_train_batch_size": 2,
        "bf16": False,
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(options))
    return file


def test_plan_shows_what_the_launcher_would_choose(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config)]) == 0
    said = capsys.readouterr().out
    assert "0-1 | 2-3" in said
    assert "512 tokens" in said
    assert "micro-batches on 2 stages take" in said
    assert not (config.parent / "out").exists()
    for given, message in (
        (["--length", "64"], "--length with pipeline_stages=2: a pipeline is planned for one replica"),
        (["--engine", "fsdp2", "--num-ranks", "2"], "--engine with pipeline_stages=2"),
        (["--memory-gib", "0.00001"], "auto, but by estimate a stage has no room for a graph"),
        (["--pipeline_stages", "9"], "num_stages=9, but the model has 4 layer group(s)"),
    ):
        assert main(["plan", str(config), *given]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("*pipeline*.yaml")), ids=lambda file: file.name
)
def test_the_example_is_fit(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the ranks that it is written for."""
    monkeypatch.chdir(ROOT)
    given = parse_options(["--config", str(file), "--bf16", "false"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = check_options(given)
    assert config is not None
    assert given.training.pipeline_stages == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="pipeline_stages=4 with 2 rank"):
        check_options(given)


def test_a_run_goes_on_with_the_stages_that_it_had(tmp_path: Path) -> None:
    order = StreamOrder(batch_sequences=4, num_samples=8, seed=0, sampling="random")
    order.values["pipeline"] = [[2, 3], 1, False]
    state = {"stateful_callbacks": {"StreamOrder": order.state()}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    refuse_other_order(tmp_path, order)
    order.values["pipeline"] = [[3, 2], 1, False]
    with pytest.raises(ValueError, match=r"layers of each stage.*was \[\[2, 3\], 1, False\] and is \[\[3, 2"):
        refuse_other_order(tmp_path, order)


def test_there_is_an_example() -> None:
    assert list((ROOT / "configs").glob("*pipeline*.yaml"))
