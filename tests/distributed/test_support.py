"""docs/support.md is what docs/make_support.py would write."""

from __future__ import annotations

import importlib.util

from tests.tiny_run import ROOT


def test_the_table_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_support", ROOT / "docs" / "make_support.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text() == module.table(), "run `python docs/make_support.py`"
