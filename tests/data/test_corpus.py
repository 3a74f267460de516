"""The default corpus: the same documents every time, long ones among them, nothing that is not source."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkdist.data.corpus import TEST_EVERY, read_standard_library, split_documents


def test_the_interpreters_own_library_is_read_in_the_same_order() -> None:
    first = read_standard_library(max_bytes=500_000)
    assert first == read_standard_library(max_bytes=500_000)
    assert len({document.path for document in first}) == len(first) > 10
    assert 250_000 < sum(len(document.text.encode()) for document in first) <= 500_000
    assert max(len(document.text) for document in first) > 8_192


def test_a_smaller_limit_is_a_prefix_and_order_is_not_the_alphabet() -> None:
    large = read_standard_library(max_bytes=400_000)
    small = read_standard_library(max_bytes=100_000)
    assert large[: len(small)] == small
    assert [document.path for document in large] != sorted(document.path for document in large)


def test_only_readable_source_is_taken(tmp_path: Path) -> None:
    for name in (
        "good.py",
        "pkg/also.py",
        "test/no.py",
        "site-packages/no.py",
        "pkg/tests/no.py",
        "note.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe latin")
    (tmp_path / "empty.py").write_text("\n")
    documents = read_standard_library(max_bytes=1_000, folder=tmp_path)
    assert {document.path for document in documents} == {"good.py", "pkg/also.py"}


def test_faults_are_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no Python source files"):
        read_standard_library(max_bytes=1_000, folder=tmp_path)
    with pytest.raises(ValueError, match="corpus_max_bytes=0"):
        read_standard_library(max_bytes=0)
    with pytest.raises(ValueError, match="less than the first document"):
        read_standard_library(max_bytes=1)


def test_splits_share_no_document() -> None:
    documents = read_standard_library(max_bytes=800_000)
    train, test = split_documents(documents)
    assert len(test) == len(documents) // TEST_EVERY > 0
    assert not {document.path for document in train} & {document.path for document in test}
    assert len(train) + len(test) == len(documents)
