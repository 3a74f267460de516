"""docs/support.md is what docs/make_support.py would write."""

from __future__ import annotations

from tests.helpers.tiny_run import ROOT, load_script


def test_the_table_is_up_to_date() -> None:
    module = load_script(ROOT / "docs" / "make_support.py")
    assert module.FILE.read_text() == module.table(), "run `python docs/make_support.py`"
