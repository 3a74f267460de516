"""The default corpus: the source files of the running interpreter's own standard library.

Long, real documents that are on every machine that can run this package, so that the default job downloads
nothing. The same interpreter always gives the same documents in the same order.
"""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

_SKIPPED_FOLDERS = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib"})
TEST_EVERY = 20
"""Every how many documents one goes to the test split."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One source file: its path below the library's folder, and its text."""

    path: str
    text: str


def read_standard_library(*, max_bytes: int, folder: Path | None = None) -> list[Document]:
    """Source files of the standard library, mixed but always in the same order.

    Args:
        max_bytes: The most bytes of UTF-8 text; reading stops before the document that would exceed it.
        folder: Where the files are; by default what `sysconfig` says about the running interpreter.

    Raises:
        ValueError: `max_bytes` is not positive, or below the size of the first document.
        RuntimeError: the interpreter came without source files.
    """
    if max_bytes < 1:
        raise ValueError(f"corpus_max_bytes={max_bytes} leaves no text: write a positive number of bytes")
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    documents: list[Document] = []
    total_bytes = 0
    paths = _source_paths(folder)
    for path in paths:
        text = _read_text(folder / path)
        if text is None:
            continue
        num_bytes = len(text.encode())
        if total_bytes + num_bytes > max_bytes:
            break
        total_bytes += num_bytes
        documents.append(Document(path=path, text=text))
    if not paths:
        raise RuntimeError(f"{folder} has no Python source files: write dataset_name: FILE.jsonl instead")
    if not documents:
        raise ValueError(
            f"corpus_max_bytes={max_bytes} is less than the first document: write a larger number"
        )
    return documents


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and every `TEST_EVERY`th one kept for evaluation."""
    train = [document for index, document in enumerate(documents) if index % TEST_EVERY != TEST_EVERY - 1]
    return train, documents[TEST_EVERY - 1 :: TEST_EVERY]


def _source_paths(folder: Path) -> list[str]:
    """Paths relative to `folder`, ordered by a checksum of themselves: mixed, the same everywhere."""
    relative = [path.relative_to(folder) for path in folder.rglob("*.py")]
    kept = [path.as_posix() for path in relative if _SKIPPED_FOLDERS.isdisjoint(path.parts[:-1])]
    return sorted(kept, key=lambda path: (zlib.crc32(path.encode()), path))


def _read_text(path: Path) -> str | None:
    """The text of a file; `None` for one that cannot be read as UTF-8, or holds nothing to learn from."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if text.strip() else None
