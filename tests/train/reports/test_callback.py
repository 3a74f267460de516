"""`ChunkCallback` under a plain `Trainer` and under TRL's: figures, files, resuming, and disks that are
full."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from chunkdist import ChunkConfig, FixedBudgetSampler, chunk_model
from chunkdist.models.flops import StepFlops
from chunkdist.train.reports import callback as callbacks
from chunkdist.train.reports.callback import ChunkCallback
from chunkdist.train.reports.metrics_file import MetricsFile, draw
from chunkdist.train.reports.token_counter import TokenCounter
from tests.distributed.ranks import Ranks
from tests.helpers.models import VOCAB_SIZE, tiny_llama, with_lora

CONFIG = ChunkConfig(chunk_size=16)
FIGURES = {
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "step_time_s",
    "peak_rss_gib",
    "num_tokens_seen",
    "loss_by_position/0-1K",
}


def llama() -> PreTrainedModel:
    return tiny_llama(num_layers=2, dtype=torch.float32, attn_implementation="sdpa", initializer_range=0.1)


def rows(num_rows: int, num_tokens: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB_SIZE, (num_rows, num_tokens), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(folder: Path, *, config: ChunkConfig | None = CONFIG, **settings: Any) -> Trainer:
    values: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **settings,
    }
    model = llama()
    trainer = Trainer(
        model=model if config is None else chunk_model(model, config),
        args=TrainingArguments(**values),
        train_dataset=rows(32, 40),
        eval_dataset=rows(2, 40),
    )
    ChunkCallback.add_to(trainer, config)
    return trainer


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Listener(TrainerCallback):
    """Keeps what trackers get to see."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class TestFigures:
    def test_file_trackers_and_state_get_the_same(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path)
        listener = Listener()
        trainer.callback_handler.callbacks.insert(1, listener)  # behind ours, as W&B's is
        trainer.train()
        records = lines(tmp_path)
        assert [record["step"] for record in records] == [1, 2, 3, 4]
        for record, logs, state in zip(
            records, listener.logs[:-1], trainer.state.log_history[:-1], strict=True
        ):
            assert set(record) >= FIGURES
            assert len(record.pop("loss_by_position")) == 1  # ranges of positions are for the file alone
            assert record == {"step": record["step"], **logs} == state
        assert "tokens_per_second" not in listener.logs[-1]  # the summary of the trainer

    @pytest.mark.parametrize(("budget", "is_noisy"), [(1, True), (5, False)])
    def test_what_spaco_kept(
        self, budget: int, is_noisy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = ChunkConfig(chunk_size=4, sampler=FixedBudgetSampler(budget))
        trainer_of(tmp_path, config=config, gradient_accumulation_steps=3).train()
        for record in lines(tmp_path):
            assert record["spaco_chunks"] == 3 * 10
            assert record["spaco_chunks_kept"] == 3 * budget
            assert record["spaco_tokens_kept"] == 3 * budget * 4
            assert record["spaco_largest_weight"] == 10 / budget
            weight = 10 / budget
            assert record["spaco_relative_variance"] == pytest.approx(weight - 1, rel=0.5)
        warning = "SpaCO's gradients are as noisy as with 1/"
        assert capsys.readouterr().out.count(warning) == is_noisy

    def test_tokens_under_accumulation_and_sparse_logging(self, tmp_path: Path) -> None:
        trainer_of(
            tmp_path, logging_steps=2, gradient_accumulation_steps=3, per_device_train_batch_size=2
        ).train()
        records = lines(tmp_path)
        assert [record["step"] for record in records] == [2, 4]
        per_step = 3 * 2 * 40
        assert [record["num_tokens_seen"] for record in records] == [2 * per_step, 4 * per_step]
        for record in records:
            assert record["tokens_per_second"] * record["step_time_s"] == pytest.approx(per_step)

    def test_padding_is_not_counted(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, max_steps=1, per_device_train_batch_size=2)

        def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            ids = torch.tensor([sample["input_ids"] for sample in samples])
            mask = torch.ones_like(ids)
            mask[1, 25:] = 0
            return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

        trainer.data_collator = collate
        trainer.train()
        assert lines(tmp_path)[0]["num_tokens_seen"] == 40 + 25
        assert "num_tokens_computed" not in lines(tmp_path)[0]

    def test_shared_tokens_are_computed_once(self, tmp_path: Path) -> None:
        def resumed(last: int, **settings: Any) -> None:
            trainer = trainer_of(tmp_path, max_steps=last, per_device_train_batch_size=2, **settings)

            def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
                ids = torch.tensor([sample["input_ids"] for sample in samples])
                ids[1, :30], ids[1, 30] = ids[0, :30], (ids[0, 30] + 1) % VOCAB_SIZE
                return {"input_ids": ids, "labels": ids}

            trainer.data_collator = collate
            trainer.train(resume_from_checkpoint=last > 2)

        resumed(2, save_strategy="steps", save_steps=2)
        resumed(4, eval_strategy="steps", eval_steps=1)
        records = [record for record in lines(tmp_path) if "eval_loss" not in record]
        assert [record["num_tokens_seen"] for record in records] == [80, 160, 240, 320]
        assert [record["num_tokens_computed"] for record in records] == [50, 100, 150, 200]

    @pytest.mark.parametrize("what", ["evaluate", "_save_checkpoint"])
    def test_evaluation_and_saving_count_neither_as_tokens_nor_as_time(
        self, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if what == "evaluate":
            trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=1)
        else:
            trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=1)
        original = getattr(trainer, what)

        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(1)
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer, what, slow)
        trainer.train()
        records = [record for record in lines(tmp_path) if "eval_loss" not in record]
        assert [record["num_tokens_seen"] for record in records] == [40, 80, 120, 160]
        assert max(record["step_time_s"] for record in records[1:]) < 1

    def test_a_plain_model_has_the_same_figures(self, tmp_path: Path) -> None:
        trainer_of(tmp_path / "plain", config=None).train()
        trainer_of(tmp_path / "chunked").train()
        for plain, chunked in zip(lines(tmp_path / "plain"), lines(tmp_path / "chunked"), strict=True):
            assert plain.keys() == chunked.keys()
            assert plain["loss"] == pytest.approx(chunked["loss"], rel=1e-4)
            assert plain["num_tokens_seen"] == chunked["num_tokens_seen"]
            for record in (plain, chunked):
                assert record["loss_by_position/0-1K"] == pytest.approx(record["loss"], rel=1e-6)

    def test_under_trl(self, tmp_path: Path) -> None:
        """Packed, without padding: TRL's own count is the same."""
        from datasets import Dataset

        sft = SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=3,
            logging_steps=1,
            max_length=48,
            packing=True,
            per_device_train_batch_size=2,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            bf16=False,
        )
        texts = [{"input_ids": row["input_ids"][: 10 + i]} for i, row in enumerate(rows(24, 40))]
        model = llama()
        trainer = SFTTrainer(
            model=model, args=sft, train_dataset=Dataset.from_list(texts), processing_class=byte_tokenizer()
        )
        chunk_model(model, CONFIG)
        ChunkCallback.add_to(trainer, CONFIG)
        trainer.train()
        records = lines(tmp_path)
        assert len(records) == 3
        for record in records:
            assert set(record) >= FIGURES
            assert record["num_tokens_seen"] == record["num_tokens"] > 0

    def test_model_flop_utilisation_on_a_known_card(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a stand-in for the card: the figure is FLOPs of the real pairs, over time and the card's
        peak."""
        trainer = trainer_of(tmp_path, max_steps=1, gradient_accumulation_steps=2)
        flops = StepFlops.of(trainer.model)
        callback = trainer.callback_handler.callbacks[0]
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
        original = callbacks._over_ranks
        monkeypatch.setattr(
            callbacks, "_over_ranks", lambda counts, peak, device: original(counts, peak, "cpu")
        )

        class CudaArguments:
            device = torch.device("cuda")

        figures = callback._figures
        monkeypatch.setattr(callback, "_figures", lambda args: figures(CudaArguments()))
        trainer.train()
        (record,) = lines(tmp_path)
        assert record["peak_memory_gib"] == 3
        assert record["mfu"] == pytest.approx(2 * flops.step([40]) / record["step_time_s"] / 989e12)

    def test_two_ranks(self) -> None:
        """Sums of tokens, each rank's memory."""
        ranks = Ranks(2)
        try:
            results = ranks.run(_over_ranks_of_two)
        finally:
            ranks.stop()
        assert results == [([21, 300], [7, 8])] * 2


def _over_ranks_of_two() -> tuple[list[int], list[int]]:
    rank = torch.distributed.get_rank()
    return callbacks._over_ranks([10 + rank, 100 * (rank + 1)], 7 + rank, torch.device("cpu"))


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{index}": index for index in range(VOCAB_SIZE)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")),
        eos_token="t1",
        pad_token="t2",
    )


class TestTokenCounter:
    def test_segments_and_masks(self) -> None:
        model = llama()
        counter = TokenCounter(model)
        flops = counter.flops
        ids = torch.zeros(1, 30, dtype=torch.long)
        positions = torch.cat([torch.arange(10), torch.arange(20)])[None]
        model(input_ids=ids, position_ids=positions)
        assert flops.from_counts(counter.take()) == flops.step([10, 20])
        model.model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 10, 30], dtype=torch.int32))
        assert flops.from_counts(counter.take()) == flops.step([10, 20])
        model(inputs_embeds=torch.zeros(2, 30, 32))
        assert flops.from_counts(counter.take()) == flops.step([30, 30])
        model(ids)
        model(ids)
        assert flops.from_counts(counter.take()) == flops.step([30, 30])
        assert counter.take() == [0, 0]

    def test_left_padding(self) -> None:
        """Padding before a sequence is not seen by its tokens."""
        model = llama()
        counter = TokenCounter(model)
        ids, mask = torch.zeros(2, 30, dtype=torch.long), torch.ones(2, 30, dtype=torch.long)
        mask[1, :12] = 0
        model(input_ids=ids, attention_mask=mask)
        assert counter.flops.from_counts(counter.take()) == counter.flops.step([30, 18])

    def test_counts_training_only_until_removed(self) -> None:
        model = llama()
        counter = TokenCounter(model)
        ids = torch.zeros(1, 30, dtype=torch.long)
        with torch.no_grad():
            model(ids)
        model.eval()
        model(ids)
        assert counter.take() == [0, 0]
        counter.remove()
        model.train()
        model(ids)
        assert counter.take() == [0, 0]

    def test_a_chunked_peft_model_counts_once(self) -> None:
        model = chunk_model(with_lora(llama()), CONFIG)
        counter = TokenCounter(model)
        ids = torch.zeros(1, 40, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        assert counter.take()[0] == 40


class TestStart:
    def test_one_table_says_what_and_why(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trainer = trainer_of(tmp_path, logging_steps=2)
        trainer.train()
        out = capsys.readouterr().out
        for words in (
            "cpu_flash",
            "first here",
            "16 tokens",
            "1 of 2",
            "rebuilt in the backward",
            "KiB a token",
        ):
            assert words in out
        assert "after all" not in out  # the attention that was expected came

    def test_the_expected_memory_where_the_length_is_known(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trainer = trainer_of(tmp_path, max_steps=1)
        trainer.args.max_length = 40
        trainer.train()
        out = capsys.readouterr().out
        assert "3 chunks of 40 tokens" in out
        assert "about" in out

    def test_the_first_step_chooses_otherwise(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from chunkdist.attention.cpu_flash import CpuFlashBackend

        trainer = trainer_of(tmp_path, max_steps=1)
        why_not = CpuFlashBackend.why_not
        monkeypatch.setattr(
            CpuFlashBackend, "why_not", lambda self, q, v: "broken" if q.ndim == 4 else why_not(self, q, v)
        )
        trainer.train()
        assert "attention is math after all: first here; not cpu_flash: broken" in capsys.readouterr().out

    def test_other_ranks_are_silent(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trainer = trainer_of(tmp_path)
        trainer.is_world_process_zero = lambda: False  # type: ignore[method-assign]
        trainer.state.is_world_process_zero = False
        trainer.train()
        assert "what" not in capsys.readouterr().out
        assert not (tmp_path / "metrics.jsonl").exists()


class TestEnd:
    def test_picture_and_summary(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trainer_of(tmp_path).train()
        assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
        last = capsys.readouterr().out.strip().splitlines()[-1]
        records = lines(tmp_path)
        assert last.startswith("chunkdist: 4 steps, 160 tokens, median")
        assert f"loss {records[0]['loss']:.4g} -> {records[-1]['loss']:.4g}" in last
        assert not list(tmp_path.glob(".*"))

    def test_no_step_logged(self, tmp_path: Path) -> None:
        trainer_of(tmp_path, logging_steps=100).train()
        assert not (tmp_path / "training.png").exists()

    def test_nothing_stays_on_the_model(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, max_steps=1)
        hooks = len(trainer.model.get_decoder()._forward_pre_hooks)
        trainer.train()
        trainer.train()
        assert len(trainer.model.get_decoder()._forward_pre_hooks) == hooks


class TestResume:
    def test_no_step_twice_after_an_older_checkpoint(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trainer_of(tmp_path / "whole", max_steps=6).train()
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        trainer_of(tmp_path / "run", **settings).train()
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write('{"step": 7, "lo')  # killed while writing
        trainer_of(tmp_path / "run", **settings).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")
        )
        records = lines(tmp_path / "run")
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
        assert [record["num_tokens_seen"] for record in records] == [40 * step for step in range(1, 7)]
        for record, whole in zip(records, lines(tmp_path / "whole"), strict=True):
            assert record["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert "dropped 3 lines of steps after 3" in capsys.readouterr().out

    def test_a_run_from_the_beginning_keeps_the_earlier_file(self, tmp_path: Path) -> None:
        trainer_of(tmp_path, max_steps=3).train()
        trainer_of(tmp_path, max_steps=2).train()
        assert [record["step"] for record in lines(tmp_path)] == [1, 2]
        assert len((tmp_path / "metrics.previous.jsonl").read_text().splitlines()) == 3


class TestEvaluation:
    def test_its_figures_have_lines_of_their_own(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 3, "eval_on_start": True}
        trainer = trainer_of(tmp_path, **settings)
        trainer.train()
        found = [(record["step"], "loss" in record, "eval_loss" in record) for record in lines(tmp_path)]
        assert found == [(0, False, True), (2, False, True), (3, True, False), (4, False, True)]
        logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert [record["eval_loss"] for record in lines(tmp_path) if "eval_loss" in record] == logged
        assert "chunkdist: 3 steps, 120 tokens" in capsys.readouterr().out

    def test_tokens_are_counted_on_after_a_line_that_has_none(self, tmp_path: Path) -> None:
        settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        trainer_of(tmp_path, **settings).train()
        trainer_of(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        records = MetricsFile(tmp_path / "metrics.jsonl").read()
        assert [record["num_tokens_seen"] for record in records] == [40, 80, 120, 160]
        assert [record["step"] for record in records if "eval_loss" in record] == [2, 4]


class TestFaults:
    def test_a_full_disk_costs_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(MetricsFile, "read", lambda self: [])  # that device has no end
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        trainer = trainer_of(tmp_path)
        trainer.train()
        assert trainer.state.global_step == 4
        out = capsys.readouterr().out
        assert out.count("warning") == 1
        assert "No space left on device; training goes on" in out

    def test_a_folder_that_cannot_be_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(self: MetricsFile, step: int) -> None:
            raise PermissionError(13, "Permission denied", str(self.path))

        monkeypatch.setattr(MetricsFile, "start", refuse)
        trainer_of(tmp_path).train()
        assert capsys.readouterr().out.count("Permission denied") == 1

    def test_half_a_line_is_taken_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.append({"step": 1, "loss": 2.0})

        class FullDisk(io.FileIO):
            def write(self, line: Any) -> int:
                return super().write(line[:5])

        monkeypatch.setattr("builtins.open", lambda path, mode, buffering: FullDisk(path, mode))
        with pytest.raises(OSError, match="No space left"):
            file.append({"step": 2, "loss": 1.0})
        monkeypatch.undo()
        assert file.path.read_text() == '{"step": 1, "loss": 2.0}\n'

    def test_a_picture_is_whole_or_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from matplotlib.figure import Figure

        def fail(figure: Figure, path: Path, **options: Any) -> None:
            path.write_bytes(b"\x89P")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Figure, "savefig", fail)
        with pytest.raises(OSError):
            draw([{"step": 1, "loss": 2.0, "peak_rss_gib": 1.0}], tmp_path / "training.png")
        assert not list(tmp_path.iterdir())

    def test_not_a_number_is_null(self, tmp_path: Path) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
        assert json.loads(file.path.read_text(), parse_constant=lambda name: 1 / 0) == {
            "step": 1,
            "loss": None,
            "grad_norm": None,
        }
        draw(file.read(), tmp_path / "training.png")

    def test_a_run_that_died_leaves_the_next_one_right(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, max_steps=2)

        class Dies(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                raise KeyboardInterrupt

        trainer.add_callback(Dies())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(Dies)
        trainer.train()
        assert [record["num_tokens_seen"] for record in lines(tmp_path)] == [40, 80]


def test_wandb_gets_the_figures(tmp_path: Path) -> None:
    """Offline: the run's own file has them in its summary."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.train.reports.test_callback import trainer_of
import wandb
trainer_of(Path({str(tmp_path / "out")!r}), report_to="wandb", max_steps=2).train()
print(sorted(wandb.run.summary.keys()))
wandb.finish()
"""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    names = ("tokens_per_second", "step_time_s", "peak_rss_gib", "loss", "loss_by_position/0-1K")
    assert all(f"'train/{name}'" in result.stdout for name in names)
