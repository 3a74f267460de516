"""The `chunkdist` command, run in this process: exit statuses, and one line for what the user did wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import chunkdist.bench
import chunkdist.check.gradients
from chunkdist import ChunkConfig, chunk_model
from chunkdist.bench import BENCHMARKS
from chunkdist.cli.main import main
from chunkdist.cli.preview import _texts
from chunkdist.train.build import build_trainer
from chunkdist.train.options.arguments import parse_options
from tests.helpers.tiny_run import TEXTS, command_line, make_model_folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    options = command_line(make_model_folder(tmp_path / "model"), TEXTS)
    pairs = zip(options[::2], options[1::2], strict=True)
    values = {
        key.removeprefix("--"): value if value == "no" else yaml.safe_load(value) for key, value in pairs
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**values, "long_samples": "truncate"}))
    return path


class TestCheck:
    def test_passes(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", str(config)]) == 0
        out = capsys.readouterr().out
        assert "gradient check passed" in out
        assert "chunked:" in out
        assert "plain:" in out
        assert not (tmp_path / "out").exists()  # nothing is left behind

    def test_options_after_the_config(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", str(config), "--chunk_size", "3", "--dtype", "bfloat16"]) == 0
        out = capsys.readouterr().out
        assert "chunks of 3," in out
        assert "in float32" in out

    def test_a_planted_fault_is_status_1(
        self, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def faulty(model: Any, chunk_config: ChunkConfig) -> Any:
            weight = model.model.layers[1].mlp.up_proj.weight
            weight.register_hook(lambda grad: grad * 1.01)
            return chunk_model(model, chunk_config)

        monkeypatch.setattr(chunkdist.check.gradients, "chunk_model", faulty)
        assert main(["check", str(config)]) == 1
        assert "gradient check FAILED" in capsys.readouterr().out

    @pytest.mark.parametrize("fault", ["a hook", "labels of padding"])
    def test_what_cannot_be_chunked_is_status_2(
        self, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        """What users put into their model, or their batch, without which chunks would be exact."""
        check = chunkdist.check.gradients.check_gradients

        def steer(module: Any, args: Any, output: Any) -> Any:
            return torch.cat([output[:, :-1], output[:, -1:] + 1], 1)

        def faulty(model: Any, batch: dict[str, Any], chunk_config: ChunkConfig) -> Any:
            if fault == "a hook":
                model.model.layers[1].mlp.register_forward_hook(steer)
            else:
                batch = {**batch, "labels": batch["input_ids"]}
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                batch["attention_mask"][:, 3:] = 0
            return check(model, batch, chunk_config)

        monkeypatch.setattr(chunkdist.check.gradients, "check_gradients", faulty)
        assert main(["check", str(config)]) == 2
        words = {"a hook": "looks at other tokens", "labels of padding": "labels of padding"}[fault]
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("chunkdist: ")
        assert words in lines[-1]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--chunk_sise", "4"], "did you mean 'chunk_size'?"),
            (["--chunk_size", "0"], "chunk_size=0"),
            (["--chunk_method", "none"], "nothing to check"),
            (["--dataset_name", "/nowhere/data.jsonl"], "/nowhere/data.jsonl"),
        ],
    )
    def test_a_fault_of_the_input_is_one_line_and_status_2(
        self, config: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
    ) -> None:
        assert main(["check", str(config), *options]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert words in lines[-1]
        assert lines[-1].startswith("chunkdist: ")
        assert not any("Traceback" in line for line in lines)

    def test_a_config_that_is_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", str(tmp_path / "no.yaml")]) == 2
        assert "no.yaml" in capsys.readouterr().err


class TestEnv:
    def test_versions_and_backends(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["env"]) == 0
        out = capsys.readouterr().out
        for name in ("transformers", "peft", "accelerate", "deepspeed", "trl", "flash-attn", "GPU"):
            assert name in out
        assert torch.__version__ in out
        assert "attention math" in out

    def test_takes_no_arguments(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["env", "--all"]) == 2
        assert "'--all'" in capsys.readouterr().err


class TestBench:
    def test_help_lists_every_benchmark(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "--help"]) == 0
        out = capsys.readouterr().out
        for name, line in BENCHMARKS.items():
            assert re.search(rf"^  {name} +{re.escape(line)}$", out, re.M)

    def test_every_name_has_a_module_and_every_module_a_name(self) -> None:
        folder = Path(chunkdist.bench.__file__).parent
        programs = {file.stem for file in folder.glob("*.py") if "\ndef main(" in file.read_text()}
        assert programs == {name.replace("-", "_") for name in BENCHMARKS}

    def test_options_go_to_the_benchmark(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "result.json"
        options = ["--smoke", "--repetitions", "1", "--json", str(file)]
        assert main(["bench", "spaco", *options]) == 0
        assert json.loads(file.read_text())["benchmark"] == "spaco"
        assert main(["bench", "spaco", "--help"]) == 0
        assert "--budgets" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments", [[], ["no-such"], ["spaco", "--no-such"], ["spaco", "--budgets", "0"]]
    )
    def test_wrong_usage(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", *arguments]) == 2
        assert "usage: chunkdist bench" in capsys.readouterr().err


class TestUsage:
    @pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["check"]])
    def test_wrong_usage_is_status_2(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(arguments) == 2
        assert "usage" in capsys.readouterr().err

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        assert "check" in out
        assert "env" in out


class TestPreview:
    def test_shows_streams_with_supervised_tokens_in_colour(
        self,
        config: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "400")
        rows = [
            {"input_ids": [*b"Q: 1+1 ", *b"A: 2"], "labels": [-100] * 7 + [*b"A: 2"]},
            {"input_ids": [*"caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode()]},
        ]
        data = tmp_path / "mixed.jsonl"
        rows[1]["labels"] = rows[1]["input_ids"]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ["--dataset_name", str(data), "--chunk_packing", "--per_device_train_batch_size", "2"]
        assert main(["preview", str(config), *options]) == 0
        out = capsys.readouterr().out
        plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
        assert (
            "step 1, rank 0 of 1, micro-batch 1: 2 sequences, 16 tokens, 8 supervised, 1 chunks of 16"
            in plain
        )
        assert "sequence 1: 11 tokens, 4 supervised, chunk 1" in plain
        assert "[chunk 1]Q: 1+1 A: 2" in plain
        assert "caf\N{LATIN SMALL LETTER E WITH ACUTE}" in plain
        assert "\x1b[2mQ\x1b[0m" in out, "not supervised: dim"
        assert "\x1b[1;36mA\x1b[0m" in out, "supervised: bright, in the colour of its sequence"
        assert not (tmp_path / "out").exists()

    def test_the_tree_of_shared_prefixes(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        texts = ["Q: one and one? A: two", "Q: one and two? A: three", "Q: one and two? A: 3", "Hello"]
        data = tmp_path / "tree.jsonl"
        data.write_text("".join(json.dumps({"input_ids": [*text.encode()]}) + "\n" for text in texts))
        options = ["--dataset_name", str(data), "--chunk_packing", "--per_device_train_batch_size", "4"]
        options += ["--chunk_size", "8", "--max_length", "100"]
        assert main(["preview", str(config), *options]) == 0
        out = capsys.readouterr().out
        assert "4 sequences, 71 tokens" in out
        assert "41 tokens are computed, since sequences share what they begin with:" in out
        tree = out[out.index("tokens are computed") :].splitlines()[1:5]
        assert [(len(line) - len(line.lstrip()), line.split(": ")[1]) for line in tree] == [
            (4, "tokens 1 to 5"),
            (4, "tokens 1 to 22"),
            (6, "tokens 12 to 20"),
            (8, "tokens 20 to 24"),
        ]
        assert main(["preview", str(config), *options, "--chunk_share_prefixes", "false"]) == 0
        assert "are computed" not in capsys.readouterr().out

    @pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_target_modules", "all-linear"]])
    def test_of_several_ranks_and_without_the_weights(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: list[str]
    ) -> None:
        """A folder without weights is enough, and the plan is that of the model with its weights."""
        values = {**yaml.safe_load(config.read_text()), "from_scratch": False}
        config.write_text(yaml.safe_dump(values))
        assert not list((tmp_path / "model").glob("*.safetensors"))
        options = ["--chunk_packing", "--num-ranks", "3", "--streams", "3", *lora]
        options += ["--chunk_share_prefixes", "false"]  # one rank would take all: they begin alike
        assert main(["preview", str(config), *options]) == 0
        titles = re.findall(r"step (\d), rank (\d) of 3, micro-batch 1", capsys.readouterr().out)
        assert titles == [("1", "0"), ("1", "1"), ("1", "2")], "one sequence a rank in a step"
        assert not (tmp_path / "out").exists()
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
        model.save_pretrained(tmp_path / "model")
        given = parse_options(["--config", str(config), "--chunk_packing", "--report_to", "none", *lora])
        whole, empty = (build_trainer(given, has_weights=has)[0] for has in (True, False))
        assert all(parameter.is_meta for parameter in empty.model.parameters())  # type: ignore[union-attr]
        assert whole.stream_sampler().cost == empty.stream_sampler().cost  # type: ignore[attr-defined]

    def test_without_packing_samples_are_shown(
        self, config: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["preview", str(config), "--streams", "1", "--tokens", "5"]) == 0
        out = capsys.readouterr().out
        assert "sample 0: 1 sequences" in out
        assert "more tokens]" in out
        assert "sample 1" not in out

    def test_of_a_config_for_another_machine(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """That resumes, and whose model will be sent to the Hub."""
        options = ["--push_to_hub", "true", "--resume_from_checkpoint", "true", "--tf32", "true"]
        options += ["--attn_implementation", "flash_attention_2"]
        assert main(["preview", str(config), "--streams", "1", *options]) == 0
        assert "sample 0: 1 sequences" in capsys.readouterr().out

    def test_control_characters_of_the_data_do_not_reach_the_terminal(self) -> None:
        class Bytes:
            def decode(self, ids: list[int]) -> str:
                return bytes(ids).decode()

        shown = "".join(_texts(b"a\x1b[31m\tb\n", Bytes()))  # type: ignore[arg-type]
        assert shown == "a\N{REPLACEMENT CHARACTER}[31m\tb\n"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--streams", "0"], "--streams 0"),
            (["--num-ranks", "0"], "--num-ranks 0"),
            (["--chunk_method", "none"], "no chunks to show"),
        ],
    )
    def test_nothing_to_show(
        self, config: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
    ) -> None:
        assert main(["preview", str(config), *options]) == 2
        assert words in capsys.readouterr().err
