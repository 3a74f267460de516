"""What the documentation says is true: examples run, tables tell all options, figures are the code's."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

from chunkdist import ChunkConfig, chunk_model
from tests.helpers.models import tiny_llama
from tests.helpers.tiny_run import BYTE_LLAMA, ROOT, load_script

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"<!-- runnable -->\n```python\n(.*?)```", re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def runnable(page: Path) -> str:
    return "\n".join(BLOCK.findall(page.read_text()))


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All marked blocks of a page, one after another, where the folder `my-model` holds a model."""
    torch.manual_seed(0)
    tiny_llama(
        dtype=torch.float32, vocab_size=258, max_position_embeddings=16384, attn_implementation="sdpa"
    ).save_pretrained(tmp_path / "my-model")
    AutoTokenizer.from_pretrained(BYTE_LLAMA).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    exec(compile(runnable(page), page.name, "exec"), {})


def test_the_readme_has_an_example() -> None:
    assert "chunk_model(" in runnable(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_option_is_told() -> None:
    from chunkdist.train.options.arguments import ChunkArguments

    page = (ROOT / "docs" / "usage.md").read_text()
    config, launcher = page.split("## Launcher")
    for field in dataclasses.fields(ChunkConfig):
        assert f"| `{field.name}` |" in config
    for field in dataclasses.fields(ChunkArguments):
        assert re.search(rf"^\|[^|]*`{field.name}`", launcher, re.M), field.name


def test_defaults_are_those_of_the_code() -> None:
    from chunkdist.train.options.arguments import ChunkArguments

    launcher = (ROOT / "docs" / "usage.md").read_text().split("## Launcher")[1]
    for field in dataclasses.fields(ChunkArguments):
        row = re.search(rf"^\| `{field.name}` \| `([^`]*)` \|", launcher, re.M)
        assert row is None or row[1].lower() == str(field.default).lower(), field.name


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(ROOT / "docs" / "make_docs.py")


def test_pages_are_up_to_date(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0, "run python docs/make_docs.py"


def test_a_page_that_is_not_up_to_date_is_told_and_written(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = (ROOT / "docs" / "sharding.md").read_text()
    page = tmp_path / "sharding.md"
    page.write_text(old.replace("MiB gathered", "GiB gathered"))
    monkeypatch.setattr(script, "DOCS", tmp_path)
    monkeypatch.setattr(script, "BLOCKS", {page.name: script.BLOCKS[page.name]})
    assert script.main(["--check"]) == 1
    assert "sharding.md is not up to date" in capsys.readouterr().out
    assert script.main([]) == 0
    assert page.read_text() == old
    page.write_text("no marks")
    with pytest.raises(ValueError, match="begin: sharding figures"):
        script.main([])


def test_results_of_a_gpu_are_shown_and_those_that_mean_nothing_refused(
    script: ModuleType, tmp_path: Path
) -> None:
    result = script.result_of("step-cpu")
    (tmp_path / "cpu.json").write_text(json.dumps(result))
    assert script.gpu_results(tmp_path) == "Not yet measured."
    result["hardware"]["gpu"] = "Made-up GPU"
    (tmp_path / "step-8b.json").write_text(json.dumps({**result, "partial": True}))
    page = script.gpu_results(tmp_path)
    assert page.startswith("### step-8b\n\nLlama of 10.3M parameters, layers 8, tokens 16,384, Made-up GPU")
    row = next(row for row in result["rows"] if row["variant"] == "chunked, K/V kept")
    time = f"{row['median_wall_s']:.3f} s +\\| {row['wall_ratio']:.2f} x"
    assert re.search(rf"\| chunked, K/V kept +\| ran +\| {time} ", page)
    assert f"It did not end. `{result['command']}`; python" in page
    (tmp_path / "step-8b.json").write_text(json.dumps({**result, "command": "chunkdist bench step --smoke"}))
    with pytest.raises(ValueError, match=r"step-8b\.json is of a run with --smoke"):
        script.gpu_results(tmp_path)


def test_the_step_in_the_picture() -> None:
    """What docs/how-it-works.md says of it: up and to the right, then down and to the left."""
    num_groups, num_chunks, chunk_size = 4, 6, 16
    model = tiny_llama(dtype=torch.float32, num_layers=8, max_position_embeddings=128)
    visits: list[tuple[int, int, bool]] = []

    def record(group: int, hidden: torch.Tensor) -> None:
        if hidden.shape[1] == chunk_size:  # not the single token on which a group learns what layers return
            chunk = hidden.storage_offset() // (hidden.shape[2] * chunk_size)
            visits.append((group, chunk, torch.is_grad_enabled()))

    for group in range(num_groups):
        norm = model.model.layers[2 * group].input_layernorm
        norm.register_forward_pre_hook(lambda module, args, group=group: record(group, args[0]))
    chunk_model(model, ChunkConfig(chunk_size=chunk_size, layers_per_group=2))
    ids = torch.zeros((1, num_chunks * chunk_size), dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    cells = [(group, chunk) for group in range(num_groups) for chunk in range(num_chunks)]
    forward, backward = [(*cell, False) for cell in cells], [(*cell, True) for cell in cells[::-1]]
    assert visits == [*forward, *backward]


def test_the_worked_example() -> None:
    """The sums of the table of docs/how-it-works.md, by its formula."""
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    rows = re.findall(r"^\| g = (\d+)[^|]*\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.M)
    assert len(rows) == 5
    num_layers, hidden, kv = 32, 8, 4
    for group, inputs, kv_kept, kv_grads, states, total in (map(int, row) for row in rows):
        assert inputs == num_layers // group * hidden
        assert kv_kept in (num_layers * kv, group * kv)
        assert kv_grads == 2 * group * kv
        assert states == 3 * hidden
        assert total == inputs + kv_kept + kv_grads + states
