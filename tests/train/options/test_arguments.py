"""Options: one name in YAML and on the command line, nothing unknown or harmful gets through."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chunkdist import ChunkConfig
from chunkdist.train.options.arguments import OptionParser, parse_options
from chunkdist.train.options.combinations import check_options
from chunkdist.train.options.shared_rows import check_shared_rows

ROOT = Path(__file__).parents[3]
BASE = {"model_name_or_path": "m", "dataset_name": "python-stdlib", "bf16": False}


def config_file(folder: Path, **values: Any) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**BASE, "output_dir": str(folder / "out"), **values}))
    return str(path)


def options(folder: Path, *arguments: str, **values: Any) -> Any:
    return parse_options(["--config", config_file(folder, **values), *arguments])


def test_the_command_line_wins_over_yaml_which_wins_over_defaults(tmp_path: Path) -> None:
    given = options(tmp_path, "--chunk_size", "7", chunk_size=5, layers_per_group=2, learning_rate="1e-3")
    assert given.chunk.chunk_size == "7"
    assert given.chunk.layers_per_group == "2"
    assert given.training.learning_rate == 1e-3
    assert given.chunk.retained_chunks == "0"
    assert not given.training.gradient_checkpointing  # TRL's own default is True


def test_every_chunk_option_reaches_the_library(tmp_path: Path) -> None:
    given = options(
        tmp_path,
        chunk_size=5,
        layers_per_group="all",
        retained_chunks=2,
        chunk_kv_grad_dtype="model",
        chunk_attention="math",
        chunk_rebuild_kv=False,
        chunk_share_prefixes=True,
        chunk_offload="host",
    )
    assert check_options(given) == ChunkConfig(
        chunk_size=5,
        layers_per_group="all",
        retained_chunks=2,
        kv_grad_dtype=None,
        attention="math",
        rebuild_kv=False,
        share_prefixes=True,
        offload="host",
    )
    assert check_options(options(tmp_path, chunk_size=5)) == ChunkConfig(
        chunk_size=5, kv_grad_dtype=torch.float32
    )
    assert check_options(options(tmp_path, chunk_method="none", gradient_checkpointing=True)) is None


def test_help_is_the_librarys_own_docstring() -> None:
    text = " ".join(OptionParser().format_help().split())
    assert "The last chunks of a stream, whose graphs are kept" in text
    assert "Raises:" not in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("chunk_sise", "chunk_size"), ("learning_rat", "learning_rate"), ("long_sample", "long_samples")],
)
def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    expected = f"unknown option '{key}': did you mean '{nearest}'"
    with pytest.raises(ValueError, match=expected):
        options(tmp_path, **{key: 1})
    for arguments in ([f"--{key}", "1"], [f"--{key}=1"]):
        with pytest.raises(ValueError, match=expected):
            options(tmp_path, *arguments)


def test_an_unknown_key_that_is_like_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown option 'qqqqqqqqqq': --help lists"):
        options(tmp_path, qqqqqqqqqq=1)
    with pytest.raises(ValueError, match="'stray' belongs to no option"):
        options(tmp_path, "stray")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spaco_budget": "many"}, "spaco_budget: 'many' in the config file"),
        ({"max_steps": 2.5}, "max_steps: 2.5 in the config file"),
        ({"long_samples": "cut"}, "long_samples: 'cut' in the config file"),
        ({"packing": "perhaps"}, "packing: 'perhaps' in the config file"),
        ({"datasets": [{"path": "a", "nam": "b"}]}, "wrong kind"),
    ],
)
def test_a_yaml_value_is_checked_like_one_of_the_command_line(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **values)


def test_a_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read: No such file"):
        parse_options(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(ValueError, match="followed by nothing"):
        parse_options(["--config"])
    with pytest.raises(ValueError, match="--config is given twice"):
        parse_options(["--config", str(ROOT / "configs/quickstart.yaml"), "--config", "my.yaml"])
    for text, message in (
        ("a: [", "cannot be read"),
        ("just text", "holds no options"),
        ("1: 2", "no option's name"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            parse_options([f"--config={tmp_path / 'bad.yaml'}"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"chunk_size": -4}, "chunk_size=-4"),
        ({"layers_per_group": "some"}, "layers_per_group='some'"),
        ({"layers_per_group": 0}, "layers_per_group=0"),
        ({"retained_chunks": -1}, "retained_chunks=-1"),
        ({"spaco_budget": 4}, "spaco_budget without chunk_method=spaco would be ignored"),
        ({"chunk_method": "none", "spaco_budget": 4}, "spaco_budget without chunk_method=spaco"),
        ({"chunk_method": "spaco", "spaco_budget": 0}, "spaco_budget=0: write 1 or more"),
        ({"chunk_method": "spaco", "spaco_cap": 2.0}, "spaco_cap=2.0 with spaco_sampler=independent"),
        ({"chunk_size": "many"}, "chunk_size='many' is not a count of tokens"),
        ({"packing": True, "packing_strategy": "wrapped"}, "attend to each other"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "skips the checks"),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"datasets": [{"path": "a"}]}, "both set"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"from_scratch": True, "use_peft": True}, "base weights would be lost"),
        ({"load_in_4bit": True}, "needs use_peft"),
        ({"load_in_4bit": True, "use_peft": True}, r"pip install 'chunkdist\[qlora\]'"),
        ({"max_length": 1}, "max_length=1: .* no token to predict"),
        ({"oom": "shrink", "chunk_method": "spaco"}, "oom=shrink with chunk_method=spaco: only exact steps"),
        ({"oom": "shrink", "chunk_packing": True}, "oom=shrink with chunk_packing=True: streams are cut"),
        ({"output_dir": __file__}, "is a file: write the name of a folder"),
    ],
)
def test_options_that_do_harm_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        check_options(options(tmp_path, **values))


def test_kernels_that_are_not_installed_are_missed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"use_liger_kernel=True .*pip install liger-kernel"):
        check_options(given)
    check_options(given, will_train=False)


@pytest.mark.parametrize("name", ["quickstart.yaml", "llama3-8b-lora-24gb.yaml"])
def test_the_configs_of_the_repository_are_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = parse_options(["--config", f"configs/{name}", "--bf16", "false"])
    config = check_options(given)
    assert config is not None
    assert given.training.max_length > int(config.chunk_size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk_method": "none"}, "chunk_method=none with sequence_parallel_size=8"),
        ({"chunk_size": 12}, "chunk_size=12 with sequence_parallel_size=8: .*such as 8"),
        ({"pipeline_stages": 2}, "pipeline_stages=2 with sequence_parallel_size=8"),
        ({"oom": "shrink"}, "oom=shrink with sequence_parallel_size=8"),
        ({"chunk_share_prefixes": "true"}, "chunk_share_prefixes=true with sequence_parallel_size=8"),
        ({"dataset_streaming": True, "max_steps": 1}, "dataset_streaming=True with sequence_parallel_size=8"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 with sequence_parallel_size=8"),
    ],
)
def test_what_sequence_parallelism_excludes(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    given = options(tmp_path, **{"chunk_size": 16, "sequence_parallel_size": 8, **values})
    with pytest.raises(ValueError, match=message):
        check_shared_rows(given, given.chunk.chunk_config(), will_train=False)


def test_fsdp2_has_no_checkpoints_of_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(tmp_path, chunk_size=16, save_only_model=True)
    check_options(given)
    monkeypatch.setattr("chunkdist.train.options.combinations.launcher_wants_fsdp", lambda: True)
    with pytest.raises(ValueError, match=r"save_only_model=True with FSDP2: .*write false"):
        check_options(given)


def test_what_ranks_that_share_rows_cannot_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan may."""
    monkeypatch.setattr("chunkdist.train.options.shared_rows.num_launched_ranks", lambda: 8)
    given = options(tmp_path, chunk_size="auto", sequence_parallel_size=8)
    check_shared_rows(given, given.chunk.chunk_config(), will_train=False)
    with pytest.raises(ValueError, match=r"chunk_size=auto with sequence_parallel_size=8: .*chunkdist plan"):
        check_shared_rows(given, given.chunk.chunk_config())


def test_ranks_are_a_multiple_of_those_that_share_rows(tmp_path: Path) -> None:
    given = options(tmp_path, chunk_size=16, sequence_parallel_size=8)
    check_shared_rows(given, given.chunk.chunk_config(), will_train=False)
    with pytest.raises(ValueError, match=r"sequence_parallel_size=8 with 1 rank\(s\): start a multiple of 8"):
        check_options(given)
