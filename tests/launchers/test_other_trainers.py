"""launchers/dpo.py, reward.py and grpo.py: from the command line to an adapter that loads, resumed runs, and
bad input."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.trainer import utils

from chunkdist.train.build import build_trainer
from chunkdist.train.options.arguments import parse_options
from chunkdist.train.options.trainer_rules import WORDS
from tests.helpers.tiny_run import BYTE_LLAMA, ROOT, load_script, write_rows

KINDS = ("dpo", "reward", "grpo")
ROWS = [
    {"prompt": "Beautiful is better than", "chosen": " ugly." * (n + 1), "rejected": f" {n} moons."}
    for n in range(6)
]


def options_of(folder: Path, kind: str, **values: Any) -> list[str]:
    model = folder / "model"
    if not model.exists():
        torch.manual_seed(0)
        sizes = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 256, "pad_token_id": 257}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).save_pretrained(model)
        AutoTokenizer.from_pretrained(BYTE_LLAMA).save_pretrained(model)
    given: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": write_rows(folder / "data.jsonl", ROWS),
        "output_dir": folder / "out",
        "chunk_size": 16,
        "bf16": False,
        "use_cpu": True,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj", "up_proj"],
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        **({"num_generations": 2, "max_completion_length": 8} if kind == "grpo" else {"max_length": 128}),
        **({"reward_funcs": f"{ROOT / 'configs' / 'rewards.py'}:printable"} if kind == "grpo" else {}),
        **values,
    }
    return [
        part
        for key, value in given.items()
        if value is not None
        for part in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]


def launch(kind: str, arguments: list[str]) -> int:
    status: int = load_script(ROOT / "launchers" / f"{kind}.py").main(arguments)
    return status


def losses(output: Path) -> dict[int, float]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_loads_and_a_resumed_run(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("TRL's head was called")

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", refuse)
    whole = tmp_path / "whole"
    assert launch(kind, options_of(tmp_path, kind, output_dir=whole)) == 0
    assert "gradient check passed" in capsys.readouterr().out
    loader = AutoPeftModelForSequenceClassification if kind == "reward" else AutoPeftModelForCausalLM
    more = {"num_labels": 1} if kind == "reward" else {}
    loaded = dict(loader.from_pretrained(whole, **more).named_parameters())
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in loaded.items())
    part = tmp_path / "part"
    assert launch(kind, options_of(tmp_path, kind, output_dir=part, max_steps=1)) == 0
    again = options_of(tmp_path, kind, output_dir=part, resume_from_checkpoint=True)
    assert launch(kind, again) == 0
    expected, found = losses(whole), losses(part)
    assert sorted(expected) == [1, 2, 3]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    for name, p in loader.from_pretrained(part, **more).named_parameters():
        torch.testing.assert_close(p, loaded[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model(kind: str, tmp_path: Path) -> None:
    """DPO's reference model is chunked before the trainer gets it."""
    given = {"use_peft": None, "lora_target_modules": None, "chunk_check": False, "save_strategy": "no"}
    assert launch(kind, options_of(tmp_path, kind, **given)) == 0
    if kind != "reward":
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


FAULTS = [
    ("dpo", {"max_length": 30}, "sample 0 is the first with"),
    ("dpo", {"max_length": 20, "long_samples": "truncate"}, "the prompt alone has 24 tokens"),
    ("dpo", {"long_samples": "split"}, "long_samples with dpo"),
    ("dpo", {"chunk_packing": True}, "chunk_packing with dpo"),
    ("dpo", {"oom": "shrink"}, "oom with dpo"),
    ("dpo", {"pipeline_stages": 2}, "unknown option 'pipeline_stages'"),
    ("reward", {"long_samples": "truncate"}, "long_samples with reward"),
    ("grpo", {"reward_funcs": None}, "reward_funcs is missing"),
    ("grpo", {"reward_funcs": "no.py:reward"}, "'no.py:reward' cannot be taken"),
    ("grpo", {"reward_funcs": "praise"}, "'praise' is no function"),
    ("grpo", {"max_length": 30}, "unknown option 'max_length'"),
    ("grpo", {"num_generations": 3}, "num_generations"),
    ("dpo", {"beta": -1}, "beta=-1.0: write 0 or more"),
    ("dpo", {"beta": "nan"}, "beta=nan"),
    ("dpo", {"loss_type": "nope"}, "loss_type='nope': write one of sigmoid"),
    ("dpo", {"label_smoothing": 2}, "label_smoothing=2.0"),
    ("dpo", {"f_divergence_type": "nope"}, "f_divergence_type='nope'"),
    ("reward", {"center_rewards_coefficient": "nan"}, "center_rewards_coefficient=nan"),
    ("grpo", {"num_generations": 1}, "num_generations=1: write 2 or more"),
    ("grpo", {"temperature": 0}, "temperature=0.0: write more than 0"),
    ("grpo", {"top_p": 2}, "top_p=2.0"),
    ("grpo", {"top_k": -5}, "top_k=-5"),
    ("grpo", {"min_p": 2}, "min_p=2.0"),
    ("grpo", {"repetition_penalty": 0}, "repetition_penalty=0.0"),
    ("grpo", {"loss_type": "nope"}, "loss_type='nope': write one of grpo"),
    ("grpo", {"scale_rewards": "nope"}, "scale_rewards='nope'"),
    ("grpo", {"importance_sampling_level": "nope"}, "importance_sampling_level='nope'"),
    ("grpo", {"num_iterations": 0}, "num_iterations=0"),
    ("grpo", {"epsilon": -1}, "epsilon=-1.0"),
    (
        "grpo",
        {"generation_kwargs": '{"num_beam": 2}'},
        "has 'num_beam', which generation does not know: write num_beams",
    ),
    ("grpo", {"beta": 0.1, "use_peft": None, "lora_target_modules": None, "from_scratch": True}, "beta=0.1"),
]


@pytest.mark.parametrize(("kind", "values", "line"), FAULTS)
def test_bad_input_is_one_line(
    kind: str, values: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(kind, options_of(tmp_path, kind, **values)) == 2
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("chunkdist: ")]
    assert len(said) == 1
    assert line in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_reference_model_has_the_same_context(kind: str, tmp_path: Path) -> None:
    """TRL loads GRPO's by the model's name: with other rotary frequencies, even an untrained policy would be
    pulled away from itself."""
    given = {"beta": 0.1, "use_peft": None, "lora_target_modules": None, "context_length": 8192}
    trainer, _ = build_trainer(parse_options(options_of(tmp_path, kind, **given), kind))
    policy, reference = trainer.model, trainer.ref_model
    assert policy.config.rope_parameters["factor"] == 4.0
    assert reference.config.rope_parameters == policy.config.rope_parameters
    assert torch.equal(reference.model.rotary_emb.inv_freq, policy.model.rotary_emb.inv_freq)


REWARDS = """
def raises(completions, **kwargs): raise KeyError("mine")
def short(completions, **kwargs): return [1.0]
def text(completions, **kwargs): return ["a"] * len(completions)
def none(completions, **kwargs): return None
def other(a, b): return [1.0]
def nan(completions, **kwargs): return [float("nan")] * len(completions)
def infinite(completions, **kwargs): return [1.0, float("inf")]
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("raises", "raises failed: KeyError: 'mine'"),
        ("short", "short returned [1.0]: return a list of 2 numbers"),
        ("text", "text returned ['a', 'a']"),
        ("none", "none returned None"),
        ("other", "other failed: TypeError"),
        ("nan", "nan returned nan"),
        ("infinite", "infinite returned inf"),
    ],
)
def test_a_reward_that_fails_is_one_line(
    name: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it is called first, training has begun."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    given = {"reward_funcs": f"{tmp_path}/rewards.py:{name}", "chunk_check": False}
    assert launch("grpo", options_of(tmp_path, "grpo", **given)) == 2
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("chunkdist: ")]
    assert line in said[-1]


def test_every_word_is_one_that_trl_knows() -> None:
    """TRL has them in its code only, as it compares them."""
    from trl.trainer import dpo_trainer, grpo_config, grpo_trainer

    code = {"dpo": inspect.getsource(dpo_trainer)}
    code["grpo"] = inspect.getsource(grpo_trainer) + inspect.getsource(grpo_config)
    for (kind, name), words in WORDS.items():
        for word in words:
            assert f'"{word}"' in code[kind], (name, word)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{**ROWS[0], "prompt": ""}], "sample 0: 'prompt' has no token"),
        (
            [{key: row[key] for key in ("chosen", "rejected")} for row in ROWS],
            "sample 0: there is no column 'prompt', and 'chosen' and 'rejected' do not begin alike",
        ),
        ([{"text": "a"}], "has no column 'chosen' and no column 'rejected', only text"),
        ([ROWS[0], {**ROWS[1], "rejected": None}], "sample 1: 'rejected' is empty"),
        ([ROWS[0], {**ROWS[1], "chosen": [{"role": "user"}]}], "'chosen'"),
    ],
)
def test_bad_samples_are_named(
    rows: list[dict[str, Any]], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options_of(tmp_path, "dpo")
    write_rows(tmp_path / "data.jsonl", rows)
    assert launch("dpo", arguments) == 2
    assert line in capsys.readouterr().err


def test_a_prompt_of_no_token_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = options_of(tmp_path, "grpo")
    write_rows(tmp_path / "data.jsonl", [ROWS[0], {**ROWS[1], "prompt": ""}])
    assert launch("grpo", arguments) == 2
    assert "train data, sample 1: 'prompt' has no token" in capsys.readouterr().err


@pytest.mark.parametrize("margin", ["much", None, float("nan")])
def test_a_margin_that_is_no_number_is_named(
    margin: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options_of(tmp_path, "reward")
    write_rows(
        tmp_path / "data.jsonl",
        [{**row, "margin": "0" if margin == "much" else 0} for row in ROWS[:1]]
        + [{**ROWS[1], "margin": margin}],
    )
    assert launch("reward", arguments) == 2
    assert "'margin' is " in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_the_quickstart_configs_are_built(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = [
        "--config",
        f"configs/{kind}-quickstart.yaml",
        "--output_dir",
        str(tmp_path),
        "--report_to",
        "none",
    ]
    trainer, config = build_trainer(parse_options([*given, "--use_cpu", "true"], kind))
    assert config is not None
    assert len(trainer.train_dataset) > 10
