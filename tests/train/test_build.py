"""The trainer: nothing is cut, dropped or trained on unasked; bad samples are named before training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from chunkdist import ChunkConfig
from chunkdist.train import build as integration
from chunkdist.train.build import (
    build_trainer,
    check_blocker,
    chunk_trainer,
    first_batch,
)
from chunkdist.train.checkpoints.saving import UNFINISHED, DiskFullError, save_model
from chunkdist.train.options.arguments import TrainingOptions, parse_options
from tests.helpers.tiny_run import ASSISTANT, CHAT_TEMPLATE, TEXTS, USER, command_line, write_rows


def options(model: Path, rows: list[dict[str, Any]], **values: Any) -> TrainingOptions:
    return parse_options(command_line(model, rows, **values))


def rows_of(dataset: Dataset, column: str = "input_ids") -> list[list[int]]:
    return [list(row) for row in dataset[column]]


def test_packing_loses_no_token_and_keeps_documents_apart(tiny_model: Path) -> None:
    trainer, _ = build_trainer(options(tiny_model, TEXTS, packing=True, long_samples="split"))
    expected = sorted(byte for row in TEXTS for byte in row["text"].encode())
    packed = rows_of(trainer.train_dataset)
    assert sorted(token for row in packed for token in row if token < 256) == expected
    assert max(map(len, packed)) == 64
    assert [sum(lengths) for lengths in trainer.train_dataset["seq_lengths"]] == [len(row) for row in packed]
    several = next(row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1)
    starts = (trainer.data_collator([several])["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert starts == [sum(several["seq_lengths"][:index]) for index in range(len(several["seq_lengths"]))]


def test_a_long_sample_is_refused_and_nothing_is_left(tiny_model: Path) -> None:
    given = options(tiny_model, TEXTS)
    with pytest.raises(
        ValueError, match=r"train data: 2 of 4 samples .* max_length=64 .* sample 2 is the first with 155"
    ):
        build_trainer(given)
    assert not (tiny_model.parent / "out").exists()


@pytest.mark.parametrize(("long_samples", "lengths"), [("truncate", [23, 45, 64, 64]), ("drop", [23, 45])])
def test_long_samples_do_what_was_asked(tiny_model: Path, long_samples: str, lengths: list[int]) -> None:
    trainer, _ = build_trainer(options(tiny_model, TEXTS, long_samples=long_samples))
    assert [len(row) for row in rows_of(trainer.train_dataset)] == lengths


def test_the_evaluation_data_is_checked_too(tiny_model: Path) -> None:
    folder = tiny_model.parent / "both"
    folder.mkdir()
    for split, rows in (("train", TEXTS[:2]), ("test", TEXTS)):
        write_rows(folder / f"{split}.jsonl", rows)
    with pytest.raises(ValueError, match="eval data: 2 of 4 samples"):
        build_trainer(options(tiny_model, [], dataset_name=folder, eval_strategy="steps", eval_steps=1))


def test_messages_need_a_chat_template(tiny_model: Path) -> None:
    rows = [{"messages": [USER, ASSISTANT]}]
    with pytest.raises(ValueError, match=r"has no chat template: write chat_template_path"):
        build_trainer(options(tiny_model, rows))
    template = tiny_model.parent / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    trainer, _ = build_trainer(
        options(tiny_model, rows, chat_template_path=template, assistant_only_loss=True)
    )
    labels = rows_of(trainer.train_dataset, "labels")[0]
    assert bytes(label for label in labels if 0 <= label < 256) == b"hi there"


def test_a_sample_without_an_assistant_is_named(tiny_model: Path) -> None:
    template = tiny_model.parent / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    rows = (
        [{"messages": [USER, ASSISTANT]}] * 5 + [{"messages": [USER]}] + [{"messages": [USER, ASSISTANT]}] * 3
    )
    given = options(tiny_model, rows, chat_template_path=template, assistant_only_loss=True)
    with pytest.raises(ValueError, match=r"train data, sample 5: .*no assistant"):
        build_trainer(given)


def test_a_sample_that_the_template_refuses_is_named(tiny_model: Path) -> None:
    template = tiny_model.parent / "template.jinja"
    template.write_text(
        "{% if messages|length > 2 %}{{ raise_exception('only two turns') }}{% endif %}" + CHAT_TEMPLATE
    )
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER]}]
    with pytest.raises(ValueError, match=r"train data, sample 1: only two turns"):
        build_trainer(options(tiny_model, rows, chat_template_path=template))


def test_a_prompt_that_leaves_no_completion_is_named(tiny_model: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a" * 70, "completion": "b"}]
    trainer, _ = build_trainer(options(tiny_model, rows[:1]))
    assert rows_of(trainer.train_dataset, "labels") == [[-100, 98, 256]]
    with pytest.raises(
        ValueError, match=r"train data, sample 1: no supervised token .none is among its first 64"
    ):
        build_trainer(options(tiny_model, rows, long_samples="truncate"))


def test_tokens_made_elsewhere_are_taken_as_they_are_and_checked(tiny_model: Path) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    trainer, _ = build_trainer(options(tiny_model, rows))
    assert trainer.train_dataset.to_list() == rows
    masked = {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}
    with pytest.raises(ValueError, match="train data, sample 1: no supervised token"):
        build_trainer(options(tiny_model, [*rows, masked]))


def test_only_text_may_be_split(tiny_model: Path) -> None:
    rows = [{"input_ids": list(range(70)), "labels": list(range(70))}]
    with pytest.raises(ValueError, match="long_samples=split cuts plain text only"):
        build_trainer(options(tiny_model, rows, long_samples="split"))
    trainer, _ = build_trainer(
        options(tiny_model, [{"input_ids": rows[0]["input_ids"]}], long_samples="split")
    )
    assert [len(row) for row in rows_of(trainer.train_dataset)] == [64, 6]


def test_models_and_tokenizers_that_are_not_there(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="gives no tokenizer"):
        build_trainer(options(tiny_model, TEXTS, model_name_or_path="nobody/nothing"))
    with pytest.raises(ValueError, match=r"model_name_or_path=.*model'"):
        build_trainer(options(tiny_model, TEXTS[:1], from_scratch=False))  # a folder without weights
    (tiny_model / "config.json").unlink()
    with pytest.raises(ValueError, match=r"gives no (config|tokenizer)"):
        build_trainer(options(tiny_model, TEXTS[:1]))


def test_assistant_only_loss_needs_messages(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="assistant_only_loss=True needs samples of messages"):
        build_trainer(options(tiny_model, TEXTS[:1], assistant_only_loss=True))


def test_the_first_batch_is_of_a_sample_long_enough_to_check(tiny_model: Path) -> None:
    rows = [{"input_ids": list(range(length))} for length in (4, 5, 6)]
    trainer, _ = build_trainer(options(tiny_model, rows))
    assert first_batch(trainer)["input_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert check_blocker(trainer) is None
    with pytest.raises(ValueError, match="no training sample has 7 tokens"):
        first_batch(trainer, min_tokens=7)


def test_weights_from_scratch_follow_the_seed(tiny_model: Path) -> None:
    def first_weight(seed: int) -> Any:
        trainer, _ = build_trainer(options(tiny_model, TEXTS[:1], seed=seed))
        return trainer.model.lm_head.weight.detach().clone()

    assert first_weight(1).equal(first_weight(1))
    assert not first_weight(1).equal(first_weight(2))


def test_a_checkpoint_is_whole_or_absent(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = build_trainer(
        options(tiny_model, TEXTS[:2], save_strategy="steps", save_steps=1, chunk_method="none")
    )

    def fill_up(self: Any, output_dir: str) -> None:
        if self.state.global_step == 2:
            assert any(Path(output_dir).iterdir()), "the model is there already"
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", fill_up)
    with pytest.raises(DiskFullError, match="no space left to save the checkpoint of step 2"):
        trainer.train()
    assert [path.name for path in (tiny_model.parent / "out").glob("checkpoint*")] == ["checkpoint-1"]


def test_the_saved_model_loads_and_a_full_disk_leaves_the_old_one(tiny_model: Path, monkeypatch: Any) -> None:
    trainer, _ = build_trainer(options(tiny_model, TEXTS[:2]))
    out = save_model(trainer)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    weights = trainer.model.state_dict()
    assert all(weights[name].equal(value) for name, value in loaded.state_dict().items())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(before)

    def fill_up(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        type(trainer.processing_class), "save_pretrained", fill_up
    )  # the weights are written by then
    with pytest.raises(DiskFullError, match="no space left to save the trained model"):
        save_model(trainer)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not (out / UNFINISHED).exists()


def test_a_model_is_pushed_when_it_is_whole(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = build_trainer(options(tiny_model, TEXTS[:2]))
    trainer.args.push_to_hub = True
    pushed: list[set[str]] = []
    out = tiny_model.parent / "out"
    monkeypatch.setattr(trainer, "push_to_hub", lambda: pushed.append({path.name for path in out.iterdir()}))
    save_model(trainer)
    assert len(pushed) == 1
    assert {"config.json", "model.safetensors"} <= pushed[0]
    assert UNFINISHED not in pushed[0]


def test_checkpointing_by_accelerate_is_refused() -> None:
    fsdp = SimpleNamespace(activation_checkpointing=True)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=fsdp)))
    with pytest.raises(ValueError, match="fsdp_activation_checkpointing=True"):
        chunk_trainer(trainer, ChunkConfig(chunk_size=4))  # type: ignore[arg-type]


def test_saving_without_weights_is_an_error(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = build_trainer(options(tiny_model, TEXTS[:2]))
    monkeypatch.setattr(
        trainer, "save_model", lambda folder, **_: Path(folder).mkdir()
    )  # what a sharded save may come to
    with pytest.raises(RuntimeError, match="no weights were gathered"):
        save_model(trainer)


def test_only_the_first_process_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    integration.print_once("second")
    monkeypatch.setenv("RANK", "0")
    integration.print_once("first")
    assert capsys.readouterr().out == "first\n"
