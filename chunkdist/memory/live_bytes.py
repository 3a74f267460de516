"""`LiveBytes`: the bytes of the storages that are alive, counted op by op.

A dispatch mode that sees every tensor an op returns, counts its storage once however many views share it, and
takes it off when the last reference to the storage goes. It counts real, fake and meta tensors alike, so that
the real code at 128K tokens of an 8B model can be measured on any machine:

    with FakeTensorMode(), LiveBytes(exclude=model.parameters()) as live:   # either order counts the same
        model(ids, labels=ids).loss.backward()
    live.peak_bytes

An op costs about 0.2 ms under a `FakeTensorMode`, and 0.06 ms with tensors on the meta device and no other
mode; the count's own share is 0.04 ms. Which kernels run (and so what they save) is decided by the device:
fake CPU tensors may take another attention than real ones.

What always holds: a storage that existed before the mode was entered is baseline and not part of
`current_bytes`, also when it was not passed in `exclude` and shows up later as a view or an in-place result.
A kernel's own scratch space and an allocator's rounding are not counted. A resize is noticed when it happens,
be it `Tensor.resize_` or `UntypedStorage.resize_`, by which FSDP2 releases what it has gathered. Backward
passes and custom `autograd.Function`s are seen, on whatever thread they run.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from chunkdist.stores.host_memory import HostMemory


class _Record:
    """One storage. `num_bytes` follows in-place resizing; `counted` is False for baseline storages."""

    __slots__ = ("counted", "num_bytes", "ref")

    def __init__(self, num_bytes: int, counted: bool) -> None:
        self.num_bytes = num_bytes
        self.counted = counted
        self.ref: weakref.ref[torch.UntypedStorage] | None = None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages while it is active.

    Args:
        exclude: Tensors that are alive already (weights, inputs), to be listed in `baseline_bytes` from the
            start.
        host: The model's host memory; its slabs count as baseline: `host.held_bytes` is their own count.
            Device and host bytes can so be told apart where both are fake tensors on a CPU.

    Attributes:
        current_bytes: Bytes of the storages that ops have made since the mode was entered and that are alive
            now. It goes on falling after the mode is left, as tensors made inside it die.
        peak_bytes: The largest `current_bytes` since the mode was entered, or since `reset_peak`.
        baseline_bytes: Bytes of the storages that were there before, as far as they were passed or met.
    """

    def __init__(self, exclude: Iterable[Tensor] = (), *, host: HostMemory | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._host = host
        self.current_bytes = 0
        self.peak_bytes = 0
        self.baseline_bytes = 0
        self._records: dict[int, _Record] = {}
        self._real_resizes: list[Any] = []
        for tensor in exclude:
            for plain in _plain_tensors(tensor):
                storage = plain.untyped_storage()
                if storage._cdata not in self._records:
                    self._add(storage, counted=False)

    def __enter__(self) -> LiveBytes:
        real: Any = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, num_bytes: int) -> Any:
            result = real(storage, num_bytes)
            record = self._records.get(storage._cdata)
            if record is not None:
                self._resize(record, storage.nbytes())
            return result

        self._real_resizes.append(real)
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._real_resizes.pop()  # type: ignore[method-assign]
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak_bytes = self.current_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        before: set[int] | None = None
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            record = self._records.get(storage._cdata)
            if record is not None:
                self._resize(record, storage.nbytes())
                continue
            if before is None:
                before = {
                    plain.untyped_storage()._cdata for plain in _tensors((args, tuple(kwargs.values())))
                }
            slab = self._host is not None and self._host.allocating
            # An unknown storage that the op was given is older than this mode: an input, or a view of one.
            self._add(storage, counted=storage._cdata not in before and not slab)
        return out

    def _add(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        key = storage._cdata
        record = _Record(storage.nbytes(), counted)
        self._records[key] = record
        # torch keeps one Python object per storage for as long as the storage lives, so its death is the
        # storage's.
        record.ref = weakref.ref(storage, partial(_forget, weakref.ref(self), key, record))
        self._change(record, record.num_bytes)

    def _resize(self, record: _Record, num_bytes: int) -> None:
        if num_bytes != record.num_bytes:
            grown = num_bytes - record.num_bytes
            record.num_bytes = num_bytes
            self._change(record, grown)

    def _change(self, record: _Record, grown: int) -> None:
        """The record's storage has grown by `grown` bytes, to `record.num_bytes`."""
        if not record.counted:
            self.baseline_bytes += grown
            return
        self.current_bytes += grown
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _remove(self, key: int, record: _Record) -> None:
        if self._records.get(key) is record:  # the address may have been taken by a new storage
            del self._records[key]
        if not record.counted:
            self.baseline_bytes -= record.num_bytes
            return
        self.current_bytes -= record.num_bytes


def _forget(self_ref: weakref.ref[LiveBytes], key: int, record: _Record, _: object) -> None:
    counter = self_ref()
    if counter is not None:
        counter._remove(key, record)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor with a storage in an op's arguments or results."""
    if isinstance(value, Tensor):
        yield from _plain_tensors(value)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself, or the ones inside a wrapper such as a DTensor, which has no storage of its own."""
    inner: Any = tensor
    if is_traceable_wrapper_subclass(inner):
        for name in inner.__tensor_flatten__()[0]:
            part = getattr(inner, name)
            if isinstance(part, Tensor):  # a DTensor names its mesh, too
                yield from _plain_tensors(part)
    elif tensor.layout == torch.strided:
        yield tensor
