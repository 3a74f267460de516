"""Options that cannot be: each is one line that names it and status 2, before anything is written. And valid
values of plain TRL, which stay accepted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from chunkdist.train.options.arguments import OptionParser, parse_options
from chunkdist.train.options.combinations import check_options
from tests.helpers.tiny_run import ROOT, TEXTS, load_script, make_model_folder, write_rows
from tests.launchers.bad_inputs import Ending, assert_refused, run_main, yaml_arguments

SAVED = {"from_scratch": False, "model_name_or_path": "a folder with weights"}
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def main() -> Any:
    return load_script(ROOT / "launchers" / "train.py").main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a run that trains; no test of this table comes so far."""
    folder = tmp_path_factory.mktemp("options")
    return {
        "model_name_or_path": str(make_model_folder(folder / "model")),
        "from_scratch": True,
        "dataset_name": str(write_rows(folder / "data.jsonl", TEXTS[:2])),
        "output_dir": str(folder / "out"),
        "max_length": 64,
        "chunk_size": 16,
        "bf16": False,
        "use_cpu": True,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def saved_model(folder: Path) -> Path:
    """A model beside the one of `folder`, with weights."""
    target = folder.with_name("saved")
    if not target.exists():
        shutil.copytree(folder, target)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(target)
    return target


def refused(main: Any, base: dict[str, Any], tmp_path: Path, word: str, **options: Any) -> str:
    if options.get("model_name_or_path") == SAVED["model_name_or_path"]:
        options["model_name_or_path"] = str(saved_model(Path(base["model_name_or_path"])))
    arguments = yaml_arguments(tmp_path / "run.yaml", **{**base, **options})
    return assert_refused(main, arguments, word=word, output_dir=Path(base["output_dir"]))


NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": None}, "learning_rate is null"),
    ({"learning_rate": [1e-3]}, "learning_rate=[0.001] is a list"),
    ({"learning_rate": {"value": 1}}, "learning_rate={'value': 1} is a mapping"),
    ({"learning_rate": NAN}, "learning_rate=nan"),
    ({"learning_rate": INFINITY}, "learning_rate=inf"),
    ({"learning_rate": -1e-3}, "learning_rate=-0.001: write 0 or more"),
    ({"learning_rate": "fast"}, "learning_rate: 'fast'"),
    ({"learning_rate": True}, "learning_rate: True"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: write 1 or more"),
    ({"per_device_train_batch_size": -1}, "per_device_train_batch_size=-1"),
    ({"per_device_train_batch_size": None}, "per_device_train_batch_size is null"),
    ({"per_device_train_batch_size": [2]}, "per_device_train_batch_size=[2] is a list"),
    ({"per_device_train_batch_size": 1.5}, "per_device_train_batch_size: 1.5"),
    ({"per_device_train_batch_size": NAN}, "per_device_train_batch_size: nan"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size=0"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
    ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps=-1"),
    ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps is null"),
    ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs=0"),
    ({"num_train_epochs": -1, "max_steps": -1}, "num_train_epochs=-1"),
    ({"num_train_epochs": NAN}, "num_train_epochs=nan"),
    ({"num_train_epochs": None}, "num_train_epochs is null"),
    ({"max_steps": 0}, "max_steps=0 would train a step"),
    ({"max_steps": -5}, "max_steps=-5"),
    ({"max_steps": None}, "max_steps is null"),
    ({"max_steps": 2.5}, "max_steps: 2.5"),
    ({"warmup_steps": -1}, "warmup_steps=-1"),
    ({"warmup_steps": NAN}, "warmup_steps=nan"),
    ({"warmup_steps": None}, "warmup_steps is null"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ({"weight_decay": NAN}, "weight_decay=nan"),
    ({"adam_beta1": 1.0}, "adam_beta1=1.0: write from 0 to less than 1"),
    ({"adam_beta2": -0.5}, "adam_beta2=-0.5"),
    ({"adam_epsilon": -1e-8}, "adam_epsilon=-1e-08"),
    ({"max_grad_norm": -1}, "max_grad_norm=-1"),
    ({"max_grad_norm": NAN}, "max_grad_norm=nan"),
    ({"max_grad_norm": [1.0]}, "max_grad_norm=[1.0] is a list"),
    ({"label_smoothing_factor": 1.5}, "label_smoothing_factor=1.5"),
    ({"neftune_noise_alpha": -5}, "neftune_noise_alpha=-5"),
    ({"logging_steps": 0}, "logging_steps=0"),
    ({"logging_steps": -1}, "logging_steps=-1"),
    ({"logging_steps": None}, "logging_steps is null"),
    ({"logging_steps": 2.5}, "logging_steps"),
    ({"save_steps": 0, "save_strategy": "steps"}, "save_steps=0"),
    ({"save_steps": -2}, "save_steps=-2"),
    ({"eval_steps": 0, "eval_strategy": "steps"}, "eval_steps=0"),
    ({"eval_delay": -1}, "eval_delay=-1"),
    ({"eval_accumulation_steps": 0}, "eval_accumulation_steps=0"),
    ({"save_total_limit": -1}, "save_total_limit=-1"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1"),
    ({"dataloader_num_workers": None}, "dataloader_num_workers is null"),
    ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, "dataloader_prefetch_factor=0"),
    ({"dataset_num_proc": 0}, "dataset_num_proc=0"),
    ({"torch_empty_cache_steps": 0}, "torch_empty_cache_steps=0"),
    ({"ddp_timeout": 0}, "ddp_timeout=0"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**40}, "seed=1099511627776"),
    ({"seed": [1, 2]}, "seed=[1, 2] is a list"),
    ({"max_length": 1}, "max_length=1"),
    ({"max_length": -64}, "max_length=-64"),
    ({"max_length": {"train": 64}}, "max_length={'train': 64} is a mapping"),
    ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
    ({"pad_to_multiple_of": "some"}, "pad_to_multiple_of=some"),
    ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1"),
    ({"corpus_max_bytes": 0}, "corpus_max_bytes=0"),
    ({"test_split_size": 2}, "test_split_size=2.0"),
    ({"use_peft": True, "lora_r": 0}, "lora_r=0"),
    ({"use_peft": True, "lora_r": -8}, "lora_r=-8"),
    ({"use_peft": True, "lora_alpha": 0}, "lora_alpha=0"),
    ({"use_peft": True, "lora_dropout": 1.0}, "lora_dropout=1.0"),
    ({"use_peft": True, "lora_dropout": NAN}, "lora_dropout=nan"),
]

CHUNKS: list[tuple[dict[str, Any], str]] = [
    ({"chunk_size": 0}, "chunk_size=0"),
    ({"chunk_size": -4}, "chunk_size=-4"),
    ({"chunk_size": "many"}, "chunk_size='many'"),
    ({"chunk_size": 1.5}, "chunk_size='1.5'"),
    ({"chunk_size": None}, "chunk_size is null"),
    ({"chunk_size": [16, 32]}, "chunk_size=[16, 32] is a list"),
    ({"layers_per_group": 0}, "layers_per_group=0"),
    ({"layers_per_group": {"all": 1}}, "layers_per_group={'all': 1} is a mapping"),
    ({"retained_chunks": -1}, "retained_chunks=-1"),
    ({"chunk_method": None}, "chunk_method is null"),
    ({"chunk_method": "spaco", "spaco_budget": 0}, "spaco_budget=0"),
    ({"chunk_method": "spaco", "spaco_sampler": "fixed", "spaco_cap": NAN}, "spaco_cap=nan"),
    ({"chunk_offload": "disk"}, "chunk_offload: 'disk'"),
    ({"chunk_kv_grad_dtype": "int8"}, "chunk_kv_grad_dtype: 'int8'"),
    ({"pipeline_stages": 0}, "pipeline_stages=0"),
    ({"sequence_parallel_size": 0}, "sequence_parallel_size=0: write 1 or more"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size=2 with 1 rank(s): start a multiple of 2"),
]

WORDS: list[tuple[dict[str, Any], str]] = [
    ({"packing": None}, "packing is null"),
    ({"packing": "perhaps"}, "packing: 'perhaps'"),
    ({"packing": [True]}, "packing=[True] is a list"),
    ({"use_cpu": {"yes": 1}}, "use_cpu={'yes': 1} is a mapping"),
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: 'cosin'"),
    ({"lr_scheduler_kwargs": [1]}, "lr_scheduler_kwargs=[1] is a list"),
    ({"lr_scheduler_kwargs": "num_cycles=1"}, "lr_scheduler_kwargs='num_cycles=1' is no mapping"),
    ({"lr_scheduler_kwargs": '{"num_cycles": '}, "lr_scheduler_kwargs is no JSON"),
    ({"model_init_kwargs": "sdpa"}, "model_init_kwargs='sdpa' is no mapping"),
    ({"model_init_kwargs": ["sdpa"]}, "model_init_kwargs=['sdpa'] is a list"),
    ({"dataset_kwargs": {"skip_prepare": True}}, "dataset_kwargs has 'skip_prepare'"),
    ({"accelerator_config": {"even_batch": True}}, "accelerator_config has 'even_batch'"),
    ({"accelerator_config": "none.json"}, "accelerator_config='none.json' cannot be read"),
    ({"fsdp": True, "fsdp_config": "none.json"}, "fsdp_config='none.json' cannot be read"),
    ({"lr_scheduler_kwargs": {"num_cycles": NAN}}, "holds NaN"),
    ({"optim_args": "momentum"}, "optim_args='momentum': write name=value"),
    ({"eval_strategy": "sometimes"}, "eval_strategy: 'sometimes'"),
    ({"include_num_input_tokens_seen": "some"}, "include_num_input_tokens_seen='some'"),
    ({"lora_target_modules": [["q_proj"]], "use_peft": True}, "lora_target_modules"),
    ({"torch_compile_mode": "nope"}, "torch_compile_mode='nope': write one of default"),
    ({"output_dir": "a\0b"}, "holds a NUL character"),
    ({"label_names": ["a", "b\0"]}, "holds a NUL character"),
    ({"dataset_config": "main"}, "dataset_config='main' with dataset_name="),
    ({"dataset_config": "main", "dataset_name": "python-stdlib"}, "dataset_config='main'"),
    ({"label_names": [None]}, "label_names"),
    ({"parallelism_config": {"tp_size": 1}}, "parallelism_config is not taken"),
    ({"fp16": True, "bf16": True}, "fp16 and bf16"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps"}, "load_best_model_at_end"),
    ({"datasets": ["a"], "dataset_name": None}, "datasets"),
    ({"datasets": [{"name": "a"}], "dataset_name": None}, "path"),
    ({"env": ["A=1"]}, "no mapping of environment variables"),
]

WITHOUT: list[tuple[dict[str, Any], str]] = [
    ({"lora_r": 8}, "lora_r without use_peft: all weights would be trained"),
    ({"lora_r": 16}, "lora_r without use_peft"),  # what is TRL's default, too
    ({"lora_target_modules": ["q_proj"]}, "lora_target_modules without use_peft"),
    ({"use_dora": True, "use_peft": False}, "use_dora without use_peft"),
    ({"use_bnb_nested_quant": True}, "use_bnb_nested_quant without load_in_4bit"),
]

PACKAGES: list[tuple[dict[str, Any], str]] = [
    ({"optim": "sgdd"}, "optim: 'sgdd'"),
    ({"optim": None}, "optim is null"),
    ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "pip install galore-torch"),
    ({"optim": "schedule_free_adamw"}, "pip install schedulefree"),
    ({"optim": "adamw_8bit"}, "needs bitsandbytes"),
    ({"optim": "paged_lion_8bit"}, "needs bitsandbytes"),
    ({"optim": "lomo"}, "pip install lomo-optim"),
    ({"optim": "adamw_torch_4bit"}, "pip install torchao"),
    ({"report_to": "tensorboard"}, "report_to=tensorboard needs tensorboard"),
    ({"report_to": ["mlflow"]}, "report_to=mlflow needs mlflow"),
    ({"report_to": "a notebook"}, "report_to='a notebook': write one of"),
    (
        {"attn_implementation": "flash_attention_2", "chunk_method": "none"},
        "attn_implementation=flash_attention_2 with chunk_method=none needs flash-attn",
    ),
    ({"activation_offloading": True}, "activation_offloading=True without an accelerator"),
    ({"report_to": "wandb", "env": {"WANDB_MODE": "sometimes"}}, "WANDB_MODE='sometimes'"),
    (
        {"report_to": "wandb", "env": {"WANDB_MODE": "online", "WANDB_API_KEY": "short"}},
        "WANDB_API_KEY: API key must have 40+ characters",
    ),
    (
        {"report_to": "wandb", "env": {"WANDB_MODE": "online", "WANDB_BASE_URL": "my.host"}},
        "WANDB_BASE_URL='my.host' is no address",
    ),
]

OLD: list[tuple[dict[str, Any], str]] = [
    ({"max_seq_length": 64}, "unknown option 'max_seq_length': write max_length"),
    ({"torch_dtype": "float32"}, "unknown option 'torch_dtype': write dtype"),
    ({"warmup_ratio": 0.1}, "unknown option 'warmup_ratio': write warmup_steps"),
    ({"group_by_length": True}, "write train_sampling_strategy: group_by_length"),
    ({"evaluation_strategy": "no"}, "unknown option 'evaluation_strategy': write eval_strategy"),
    ({"tokenizer": "gpt2"}, "the tokenizer is that of model_name_or_path"),
    ({"overwrite_output_dir": True}, "resume_from_checkpoint: true"),
]

DEEPSPEED: list[tuple[Any, str]] = [
    ("none.json", "deepspeed='none.json' does not exist"),
    ([], "cannot be read"),  # a folder
    ("[1, 2]", "holds list, not a mapping"),
    ("{'stage': 2", "is no JSON"),
    ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage=7"),
    ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage='two'"),
    ({"zero_optimization": [2]}, "zero_optimization=[2] is to be a mapping"),
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu=0"),
    ({"bf16": True}, "bf16=True is to be a mapping"),
    ({"zero_optimization": {"stage": 2}}, "no launcher has started this process"),
]


def name_of(value: Any) -> str:
    return json.dumps(value)[:60] if isinstance(value, dict) else ""


@pytest.mark.parametrize(
    ("options", "word"), [*NUMBERS, *CHUNKS, *WORDS, *WITHOUT, *PACKAGES, *OLD], ids=name_of
)
def test_a_bad_option_is_one_line(
    main: Any, base: dict[str, Any], tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    refused(main, base, tmp_path, word, **options)


@pytest.mark.parametrize(("content", "word"), DEEPSPEED)
def test_a_bad_deepspeed_config_is_one_line(
    main: Any, base: dict[str, Any], tmp_path: Path, monkeypatch: Any, content: Any, word: str
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path = tmp_path / "deepspeed.json"
    if content == []:
        path.mkdir()
    elif content != "none.json":
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    refused(main, base, tmp_path, word, deepspeed="none.json" if content == "none.json" else str(path))
    if isinstance(content, dict):
        refused(main, base, tmp_path, word, deepspeed=content)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"seed: 1\nlearning_rate: 1\nseed: 2\n", "'seed' is given twice, in lines 1 and 3"),
        (b"lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", "'a' is given twice, in lines 2 and 3"),
        (b"datasets:\n- path: a\n  path: b\n", "'path' is given twice"),
        (b"- seed\n", "holds no options"),
        (b"", "holds no options"),
        (b"seed: \xff\n", "cannot be read"),
        (b"seed: {\n", "cannot be read"),
        (b"1: 2\n", "no option's name"),
    ],
)
def test_a_bad_yaml_file_is_one_line(
    main: Any, base: dict[str, Any], tmp_path: Path, text: bytes, word: str
) -> None:
    (tmp_path / "run.yaml").write_bytes(text)
    arguments = ["--config", str(tmp_path / "run.yaml"), "--output_dir", base["output_dir"]]
    assert_refused(main, arguments, word=word, output_dir=Path(base["output_dir"]))


def test_a_pipe_is_not_waited_for(main: Any, base: dict[str, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    out = ["--output_dir", base["output_dir"]]
    assert_refused(
        main,
        ["--config", str(tmp_path / "pipe"), *out],
        word="is a pipe",
        output_dir=Path(base["output_dir"]),
    )
    refused(main, base, tmp_path, "is a pipe", deepspeed=str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--learning_rate", "nan"], "learning_rate=nan"),
        (["--per_device_train_batch_size=0"], "per_device_train_batch_size=0"),
        (["--lora-r", "8"], "lora_r without use_peft"),
        (["--deepspeed", "none.json"], "deepspeed='none.json' does not exist"),
        (["--max-seq-length", "64"], "write max_length"),
        (["--include_num_input_tokens_seen", "some"], "include_num_input_tokens_seen='some'"),
        (["--accelerator_config", '{"even": 1}'], "accelerator_config has 'even'"),
    ],
)
def test_the_command_line_is_checked_as_yaml_is(
    main: Any, base: dict[str, Any], tmp_path: Path, arguments: list[str], word: str
) -> None:
    given = [*yaml_arguments(tmp_path / "run.yaml", **base), *arguments]
    assert_refused(main, given, word=word, output_dir=Path(base["output_dir"]))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 8}, "drops all 2 samples"),
        ({"use_peft": True, "lora_target_modules": ["nothing"], **SAVED}, "nothing"),
        (
            {"use_peft": True, "lora_modules_to_save": ["norm", "lm_haed"], **SAVED},
            "lora_modules_to_save: the model has no module 'lm_haed': write one of its names, as lm_head",
        ),
        (
            {"use_peft": True, "lora_target_parameters": ["mlp.up_proj"], **SAVED},
            "no parameter 'mlp.up_proj': write one of its names, as up_proj.weight",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "lr_scheduler_kwargs"),
        ({"fsdp": "full_shard"}, "fsdp: Using fsdp only works in distributed"),
        ({"attn_implementation": "fast"}, "attn_implementation"),
        ({"model_init_kwargs": {"num_layers": 2}, **SAVED}, "num_layers"),
    ],
)
def test_what_only_the_trainer_refuses_is_one_line_too(
    main: Any, base: dict[str, Any], tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    refused(main, base, tmp_path, word, **options)


def test_accelerates_settings_at_odds(main: Any, base: dict[str, Any], tmp_path: Path) -> None:
    refused(main, base, tmp_path, "mixed_precision: fp16", env={"ACCELERATE_MIXED_PRECISION": "fp16"})
    refused(main, base, tmp_path, "deepspeed is not set", env={"ACCELERATE_USE_DEEPSPEED": "true"})


def test_a_rank_left_from_another_job_hides_no_line(
    main: Any, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refused(main, base, tmp_path, "max_steps=0", max_steps=0)


def test_a_fault_of_our_own_is_no_line(
    main: Any, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher's own errors must not be taken for the input's."""
    from chunkdist.train import build as trl

    def forgetful(options: Any) -> Any:
        return {}["a key that we have forgotten"]

    forgetful.__code__ = forgetful.__code__.replace(co_filename=trl.__file__)
    monkeypatch.setattr(trl, "check_engine", forgetful)
    with pytest.raises(KeyError, match="a key that we have forgotten"):
        run_main(main, yaml_arguments(tmp_path / "run.yaml", **base))


VALID: list[dict[str, Any]] = [
    {"max_grad_norm": None},
    {"max_grad_norm": INFINITY},
    {"max_grad_norm": 0},
    {"learning_rate": 0},
    {"learning_rate": "1e-4"},
    {"warmup_steps": 0.1},
    {"num_train_epochs": 0, "max_steps": 3},
    {"num_train_epochs": 0.5, "max_steps": -1},
    {"eval_steps": None},
    {"save_total_limit": None},
    {"max_length": None},
    {"pad_to_multiple_of": 8},
    {"pad_to_multiple_of": None},
    {"logging_steps": 0.5},
    {"report_to": None},
    {"report_to": []},
    {"debug": None},
    {"data_seed": -1},
    {"lr_scheduler_kwargs": {"num_cycles": 1}},
    {"lr_scheduler_kwargs": '{"num_cycles": "1"}'},
    {"accelerator_config": {"even_batches": True}},
    {"dataset_kwargs": {"skip_prepare_dataset": False}},
    {"optim_target_modules": ["q_proj"]},
    {"optim_target_modules": "all-linear"},
    {"use_peft": True, "lora_target_modules": "all-linear", "from_scratch": False},
    {"use_peft": True, "lora_target_modules": ["q_proj"], "lora_dropout": 0, "from_scratch": False},
    {"attn_implementation": "flash_attention_2"},
    {"neftune_noise_alpha": 5},
    {"adam_epsilon": 0},
    {"gradient_checkpointing": None},
    {"tf32": None},
    {"optim_args": "momentum=0.9,nesterov=True"},
    {"env": {"MY_VARIABLE": 1}},
    {"torch_compile_mode": "max-autotune"},
    {"include_num_input_tokens_seen": "all"},
    {"include_num_input_tokens_seen": "non_padding"},
    {"include_num_input_tokens_seen": True},
    {"trackio_static_space_id": False},
    {"trackio_static_space_id": "me/mine"},
]


@pytest.mark.parametrize("options", VALID, ids=name_of)
def test_valid_values_of_plain_trl_stay_accepted(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("MY_VARIABLE", "")
    check_options(parse_options(yaml_arguments(tmp_path / "run.yaml", **{**base, **options})))


def test_values_that_are_words_or_booleans_arrive_as_such(base: dict[str, Any], tmp_path: Path) -> None:
    def training(*arguments: str, **options: Any) -> Any:
        path = yaml_arguments(tmp_path / "run.yaml", **{**base, **options})
        return parse_options([*path, *arguments]).training

    assert training(include_num_input_tokens_seen="all").include_num_input_tokens_seen == "all"
    assert training(include_num_input_tokens_seen=True).include_num_input_tokens_seen == "all"
    assert training(include_num_input_tokens_seen=False).include_num_input_tokens_seen == "no"
    name = "include_num_input_tokens_seen"
    assert training(f"--{name}", "non_padding").include_num_input_tokens_seen == "non_padding"
    assert training(f"--{name}").include_num_input_tokens_seen == "all"
    assert training(trackio_static_space_id=False).trackio_static_space_id is False
    assert training(eval_strategy=False).eval_strategy == "no"  # what YAML makes of an unquoted no


def test_old_names_are_old_and_new_ones_are_new() -> None:
    from chunkdist.train.options.names import OLD_NAMES

    known = {action.dest for action in OptionParser()._actions}
    assert not known & set(OLD_NAMES)
    for old, advice in OLD_NAMES.items():
        words = {word.strip(",:;") for word in advice.split()}
        assert words & known or "environment" in advice or "always" in advice, (old, advice)


def test_every_number_has_a_range_that_its_default_is_in() -> None:
    from chunkdist.train.options.rules import RANGES

    actions = {action.dest: action for action in OptionParser()._actions}
    numbers = {
        name for name, action in actions.items() if getattr(action.type, "__name__", "") in ("int", "float")
    }
    assert numbers - {"num_train_epochs"} == set(RANGES)
    for name, allowed in RANGES.items():
        default = actions[name].default
        assert default is None or allowed.holds(default), name


def test_the_harness_can_fail(base: dict[str, Any], tmp_path: Path) -> None:
    """A run that is not refused, and one that writes, do not pass."""

    def writes(arguments: Any) -> int:
        (tmp_path / "out").mkdir(exist_ok=True)
        return fails(arguments)

    def fails(arguments: Any) -> int:
        import sys

        print("chunkdist: a word", file=sys.stderr)
        return 2

    assert_refused(fails, [], word="a word", output_dir=tmp_path / "out")
    for main, word in ((fails, "another"), (writes, "a word"), (lambda arguments: 0, "a word")):
        with pytest.raises(AssertionError):
            assert_refused(main, [], word=word, output_dir=tmp_path / "out")
    ending = run_main(fails, [])
    assert ending == Ending(status=2, lines=["chunkdist: a word"], stderr="chunkdist: a word\n")
