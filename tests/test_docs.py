"""What the documentation says is true: examples run, tables tell all options, figures are the code's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from chunkdist import ChunkConfig
from tests.helpers.models import tiny_llama
from tests.helpers.tiny_run import ROOT, load_script

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
        dtype=torch.float32, vocab_size=256, max_position_embeddings=16384, attn_implementation="sdpa"
    ).save_pretrained(tmp_path / "my-model")
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
    from chunkdist.train.options import ChunkArguments

    page = (ROOT / "docs" / "usage.md").read_text()
    config, launcher = page.split("## Launcher")
    for field in dataclasses.fields(ChunkConfig):
        assert f"| `{field.name}` |" in config
    for field in dataclasses.fields(ChunkArguments):
        assert re.search(rf"^\|[^|]*`{field.name}`", launcher, re.M), field.name


def test_defaults_are_those_of_the_code() -> None:
    from chunkdist.train.options import ChunkArguments

    launcher = (ROOT / "docs" / "usage.md").read_text().split("## Launcher")[1]
    for field in dataclasses.fields(ChunkArguments):
        row = re.search(rf"^\| `{field.name}` \| `([^`]*)` \|", launcher, re.M)
        assert row is None or row[1].lower() == str(field.default).lower(), field.name


def figures_script() -> ModuleType:
    return load_script(ROOT / "docs" / "make_figures.py")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return figures_script()


def test_the_step_in_the_picture(script: ModuleType) -> None:
    """What docs/how-it-works.md says of it: up and to the right, then down and to the left."""
    in_forward, in_backward = script.recorded_step()
    cells = [(group, chunk) for group in range(script.NUM_GROUPS) for chunk in range(script.NUM_CHUNKS)]
    assert [(visit.group, visit.chunk) for visit in in_forward] == cells
    assert [(visit.group, visit.chunk) for visit in in_backward] == cells[::-1]


def test_the_picture_is_drawn(script: ModuleType, tmp_path: Path) -> None:
    script.grid_figure().savefig(tmp_path / "grid.svg")
    assert (tmp_path / "grid.svg").stat().st_size > 10_000


def test_a_table_from_results(script: ModuleType) -> None:
    step = {
        "command": "time it",
        "num_repetitions": 5,
        "model": {
            "num_parameters": 9_900_000,
            "num_layers": 8,
            "hidden_size": 320,
            "dtype": "float32",
            "num_tokens": 8192,
            "chunk_size": 1024,
        },
        "hardware": {"cpu": "a processor", "num_threads": 2},
        "summary": {
            script.BASELINE: {"wall_ratio": 1.0, "largest_gradient_difference": 0.0},
            "chunked": {"wall_ratio": 1.034, "largest_gradient_difference": 3.4e-7},
        },
    }
    peaks = {"peak_bytes": {"16384": 1, "32768": 2}}
    memory = {
        "command": "count it",
        "chunk_size": 2048,
        "summary": {
            script.BASELINE: {"bytes_per_token": 512 * 1024.0, **peaks},
            "chunked": {"bytes_per_token": 292 * 1024.0, **peaks},
            "only counted": {"bytes_per_token": 136 * 1024.0, **peaks},
        },
    }
    page = script.readme_with_table("<!-- begin: figures --> old <!-- end: figures -->", step, memory)
    assert f"| {script.BASELINE} | 512 KiB | 1.00 x | reference |" in page
    assert "| chunked | 292 KiB | 1.03 x | 3e-07 |" in page
    assert "| only counted | 136 KiB | not yet measured | not yet measured |" in page
    assert all(said in page for said in ("`time it`", "`count it`", "16,384 and 32,768", "a processor"))
    assert "old" not in page
    assert "not yet measured" in script.readme_with_table(page, None, None)


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
