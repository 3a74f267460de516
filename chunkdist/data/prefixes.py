"""What sequences of a global batch begin with in common. Those that share a prefix cost less in one stream,
which computes it once (`chunkdist.stream.layout`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from chunkdist.data.ragged import flat, tables
from chunkdist.stream.layout import PrefixRule, by_path, num_equal

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class SharedPrefixes:
    """Common beginnings, as the nodes of trees.

    Args:
        lengths: By node, its tokens.
        paths: By sequence, the nodes that it begins with, the shortest first. Sequences that are not there
            share nothing.
    """

    lengths: tuple[int, ...] = ()
    paths: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, ids: Mapping[int, Tensor], rule: PrefixRule) -> Self:
        """Those of sequences with the token ids (T,), on the CPU."""
        indices = list(ids)
        keys = [ids[index][:, None] for index in indices]
        lengths: list[int] = []
        parents: list[int | None] = []
        deepest: dict[int, int | None] = {}
        path: list[int] = []  # of the sequence before, in an order in which neighbours share the most
        last: int | None = None
        for position in by_path(keys):
            shared = 0 if last is None else num_equal(keys[last], keys[position])
            shared -= shared % rule.multiple
            shared = shared if shared >= rule.least else 0
            below = None
            while path and lengths[path[-1]] > shared:
                below = path.pop()
            parent = path[-1] if path else None
            if last is not None and shared and (parent is None or lengths[parent] < shared):
                node = len(lengths)
                lengths.append(shared)
                parents.append(parent)
                path.append(node)
                if below is None:
                    deepest[indices[last]] = node
                else:
                    parents[below] = node
            deepest[indices[position]] = path[-1] if path else None
            last = position
        return cls(
            lengths=tuple(lengths),
            paths={index: _path(node, parents) for index, node in deepest.items() if node is not None},
        )

    def among(self, indices: Sequence[int]) -> SharedPrefixes:
        """The same of some sequences, by their place in `indices`."""
        paths = {place: self.paths[index] for place, index in enumerate(indices) if index in self.paths}
        return SharedPrefixes(lengths=self.lengths, paths=paths)

    def in_one(self, indices: Sequence[int]) -> tuple[int, ...]:
        """By sequence of a stream, its first tokens that one before it begins with, too."""
        held, found = HeldPrefixes(self), []
        for index in indices:
            found.append(held.shared(index).get(0, 0))
            held.put(index, 0)
        return tuple(found)


NO_PREFIXES = SharedPrefixes(paths={})


class HeldPrefixes:
    """Which bins have sequences with which prefixes."""

    def __init__(self, prefixes: SharedPrefixes) -> None:
        self._prefixes = prefixes
        self._bins: dict[int, set[int]] = defaultdict(set)

    def shared(self, index: int) -> dict[int, int]:
        """By bin, how many first tokens of a sequence are in it; bins that have none of them are left out."""
        found: dict[int, int] = {}
        for node in self._prefixes.paths.get(index, ()):
            found.update(dict.fromkeys(self._bins[node], self._prefixes.lengths[node]))
        return found

    def put(self, index: int, number: int) -> None:
        """The sequence goes into a bin."""
        for node in self._prefixes.paths.get(index, ()):
            self._bins[node].add(number)


class SamplePrefixes:
    """Finds the prefixes that samples of a dataset share. Once, all samples are looked at, by their first
    tokens; later those of a global batch that have these in common are read whole.

    Args:
        samples: Rows with `input_ids`.
    """

    def __init__(self, samples: Dataset, rule: PrefixRule) -> None:
        self._samples = samples.select_columns(["input_ids"]).with_format("arrow")
        self._rule = rule
        self._first = _first_tokens(samples, max(rule.least, rule.multiple))

    def __call__(self, indices: Sequence[int]) -> SharedPrefixes:
        """Those of some samples, by their place in `indices`."""
        alike: dict[int, list[int]] = defaultdict(list)
        for place, index in enumerate(indices):
            if (first := self._first[index]) is not None:
                alike[first].append(place)
        places = [place for group in alike.values() if len(group) > 1 for place in group]
        if not places:
            return NO_PREFIXES
        table: Any = self._samples[[indices[place] for place in places]]
        offsets, values = flat(table["input_ids"])
        ids = values.to_numpy(zero_copy_only=False).astype(np.int64)
        rows = [torch.from_numpy(ids[start:end]) for start, end in pairwise(offsets)]
        return SharedPrefixes.of(dict(zip(places, rows, strict=True)), self._rule)


def _first_tokens(samples: Dataset, num_tokens: int) -> list[int | None]:
    """By sample, a number for its first tokens, equal for equal ones; `None`: it has fewer."""
    found: list[int | None] = []
    for _, table in tables(samples, ["input_ids"]):
        offsets, values = flat(table["input_ids"])
        ids = values.to_numpy(zero_copy_only=False)
        found += [
            hash(ids[start : start + num_tokens].tobytes()) if start + num_tokens <= end else None
            for start, end in pairwise(offsets)
        ]
    return found


def _path(node: int | None, parents: Sequence[int | None]) -> tuple[int, ...]:
    path: list[int] = []
    while node is not None:
        path.insert(0, node)
        node = parents[node]
    return tuple(path)
