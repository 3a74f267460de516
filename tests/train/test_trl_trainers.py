"""TRL's trainers, their models chunked after they are made: the same losses, figures and weights, and no
logits of a row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.trainer import utils

from chunkdist import ChunkConfig, chunk_model, chunk_report, unchunk_model
from chunkdist.chunking import num_computed
from chunkdist.loss import cross_entropy
from tests.helpers.row_logits import RowLogits
from tests.helpers.tiny_run import BYTE_LLAMA

CONFIG = ChunkConfig(chunk_size=16)
TEXTS = [
    "Beautiful is better than ugly.",
    "Now is better than never, although never is often better than right now.",
    "Flat is better than nested.",
]
ANSWERS = [
    "Sparse is better than dense.",
    "Yes.",
    "In the face of ambiguity, refuse the temptation to guess.",
]
VOCAB = 258


def tiny(kind: Any = Qwen2ForCausalLM, seed: int = 0, **values: Any) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=256,
        pad_token_id=257,
        **values,
    )
    return kind(config)


def preferences(*columns: str) -> Dataset:
    values = {"prompt": TEXTS, "chosen": ANSWERS, "rejected": ANSWERS[::-1]}
    rows = {column: values[column] * 4 for column in columns}
    if "margin" in columns:
        rows["margin"] = [0.5, 0.1, 0.2] * 4
    return Dataset.from_dict(rows)


def prompts(num_rows: int) -> Dataset:
    """Trainers that generate pad them on the left, by more than a chunk, and completions on the right."""
    return Dataset.from_dict({"prompt": ["Beautiful is better than", "Now is"] * num_rows})


def masks_of(trainer: Any) -> list[torch.Tensor]:
    """Of the training forwards to come, which tokens are no padding (B, T)."""
    masks: list[torch.Tensor] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            masks.append(kwargs["attention_mask"])

    decoder = trainer.accelerator.unwrap_model(trainer.model).get_decoder()
    decoder.register_forward_pre_hook(look, with_kwargs=True)
    return masks


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion))) + len(completion) / 7 for completion in completions]


def ends_early(model: Any) -> Any:
    """A model whose completions end at different tokens."""
    with torch.no_grad():
        model.lm_head.weight[256] *= 6
    return model


def trainer_of(name: str, folder: Path, *, lora: bool, model: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "optim": "sgd",
        **changes,
    }
    tokenizer = AutoTokenizer.from_pretrained(BYTE_LLAMA)
    kind = Qwen2ForSequenceClassification if name == "Reward" else Qwen2ForCausalLM
    changed = {"Reward": {"num_labels": 1}, "DPO": {"final_logit_softcapping": 4.0, "logit_scale": 0.7}}
    model = model or tiny(kind, **changed.get(name, {}))
    made: dict[str, Any] = {"model": model}
    if name == "SFT":
        made["train_dataset"] = Dataset.from_dict({"text": TEXTS * 4})
    elif name == "DPO":
        made["train_dataset"] = preferences("prompt", "chosen", "rejected")
        made["ref_model"] = None if lora else tiny(seed=1)
    elif name == "KTO":
        rows = {"prompt": TEXTS, "completion": ANSWERS, "label": [True, False, True]}
        made["train_dataset"] = Dataset.from_dict({key: value * 4 for key, value in rows.items()})
        made["ref_model"] = None if lora else tiny(seed=1)
    elif name == "Reward":
        rows = {"chosen": ANSWERS, "rejected": TEXTS, "margin": [0.5, 0.1, 0.2]}
        made["train_dataset"] = Dataset.from_dict({key: value * 4 for key, value in rows.items()})
    else:
        made |= {"model": ends_early(model), "train_dataset": prompts(6)}
        given |= {"per_device_train_batch_size": 4, "max_completion_length": 24}
        if name == "Distillation":
            made["teacher_model"] = tiny(seed=1)
        else:
            made["reward_funcs"] = reward
            given |= {"num_generations": 2, "beta": 0.1 if lora else 0.0, "temperature": 0.8}
            given["shuffle_dataset"] = False  # a micro-batch has both prompts
    if lora:
        task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
        made["peft_config"] = LoraConfig(
            r=4, target_modules="all-linear", task_type=task, init_lora_weights=False
        )
        if name != "Reward":
            made["peft_config"].exclude_modules = ["lm_head"]
    args = getattr(trl, f"{name}Config")(**given)
    return getattr(trl, f"{name}Trainer")(args=args, processing_class=tokenizer, **made)


def run(trainer: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    trainer.train()
    logs = [
        {key: value for key, value in entry.items() if "time" not in key and "second" not in key}
        for entry in trainer.state.log_history[:-1]
    ]
    return logs, {name: p.detach() for name, p in trainer.model.named_parameters()}


def assert_same_run(
    found: Any, expected: Any, start: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-4, abs=tolerance), key
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=tolerance, msg=name)
    moved = max((start[name] - value).abs().max().item() for name, value in expected[1].items())
    assert moved > 100 * tolerance, "weights that hardly move show nothing"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "Distillation"])
def test_three_steps_are_the_plain_trainers(
    name: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(name, tmp_path, lora=lora)
    start = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    expected = run(trainer)

    def refuse(*args: object) -> None:
        raise AssertionError("TRL's head was called")

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", refuse)
    trainer = trainer_of(name, tmp_path, lora=lora)
    for model in ("model", "ref_model", "teacher_model"):
        if getattr(trainer, model, None) is not None:
            chunk_model(getattr(trainer, model), CONFIG)
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", 1)
    masks = masks_of(trainer)
    with RowLogits(VOCAB) as logits:
        found = run(trainer)
    assert_same_run(found, expected, start)
    assert logits.count == 0 or name == "Distillation"  # whose head is TRL's own, in tiles of 4,096 tokens
    if name in ("GRPO", "RLOO"):
        assert any(x["completions/min_length"] < x["completions/max_length"] for x in found[0])
        for mask in masks:
            num_left = (mask.cumsum(1) == 0).sum(1)
            assert num_left.min() == 0
            assert num_left.max() > CONFIG.chunk_size
    assert caplog.text.count("gradient checkpointing is switched off") == 1
    assert "logits" not in caplog.text
    if name in ("DPO", "GRPO", "RLOO"):  # prompts are longer than a chunk
        assert num_computed(trainer.model) < passed_to(trainer)


def passed_to(trainer: Any) -> int:
    """Tokens of its training forwards, padding left out."""
    entries = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    return int(entries[-1])


def test_a_mixture_of_experts_has_its_balance_loss(tmp_path: Path) -> None:
    """TRL's default: the coefficient of the model's config."""
    results = []
    for chunked in (False, True):
        torch.manual_seed(0)
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
        sizes |= {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "router_aux_loss_coef": 0.3, "initializer_range": 0.2}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = trainer_of("DPO", tmp_path, lora=False, model=model)
        if chunked:
            chunk_model(trainer.model, CONFIG)
        results.append(run(trainer))
    assert all(entry["aux_loss"] > 0 for entry in results[0][0])
    assert_same_run(results[1], results[0], start)


def test_a_value_head_and_pooled_rewards() -> None:
    ids = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < torch.tensor([40, 13, 27])[:, None]).long()
    ids = ids.masked_fill(mask == 0, 257)
    for kind in (Qwen2ForTokenClassification, Qwen2ForSequenceClassification):
        results = []
        for chunked in (False, True):
            model = tiny(kind, num_labels=1)
            if chunked:
                chunk_model(model, CONFIG)
            scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            if scores.ndim == 3:
                scores = scores * mask[..., None]
            scores.square().sum().backward()
            results.append([scores, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    model = chunk_model(tiny(), CONFIG).train()
    model.activation_checkpointing_enable()
    ids = torch.randint(0, 256, (1, 40))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        assert not model.is_gradient_checkpointing
    assert caplog.text.count("switched off") == 1
    assert unchunk_model(model).is_gradient_checkpointing


def test_auto_is_chosen_where_the_decoder_runs() -> None:
    """By those who call the decoder past the causal LM, too."""
    model = chunk_model(tiny(), ChunkConfig(chunk_size="auto")).train()
    ids = torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        model.model(input_ids=ids)
    assert chunk_report(model).reason.startswith("auto: chosen in the first step")
    model.model(input_ids=ids).last_hidden_state.sum().backward()
    assert not chunk_report(model).reason.startswith("auto: chosen in the first step")
    twin = copy.deepcopy(model)
    assert twin.model._chunkdist_model.model is twin
