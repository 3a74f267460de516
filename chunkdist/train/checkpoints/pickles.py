"""What the pickles of a checkpoint would build, found without building it.

One process, DDP and the pipeline load with torch's `weights_only`. FSDP2's metadata and the values beside its
tensors (torch 2.13: `FileSystemReader.read_metadata`, `DefaultLoadPlanner.load_bytes`) and DeepSpeed's states
(0.19) are loaded without: a pickle there may name any function, and loading calls it. So their pickles are
first read by an unpickler that has no functions to call; a name that these engines do not write is a fault
of the checkpoint.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_LATEST = re.compile(r"global_step\d+(_universal)?")
_TORCH = re.compile(r"torch (\w+Storage|b?float\d\w*|bfloat16|float|double|half|u?int\d+|complex\d+|bool)")
_DCP = ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta")
_KNOWN = frozenset(
    {
        *("builtins set", "builtins bytearray", "collections OrderedDict", "collections defaultdict"),
        *("_codecs encode", "pathlib PosixPath", "pathlib._local PosixPath"),
        *("torch Size", "torch Tensor", "torch device", "torch strided", "torch contiguous_format"),
        *(
            "torch.nn.parameter Parameter",
            "torch._utils _rebuild_parameter",
            "torch._utils _rebuild_tensor_v2",
        ),
        *(
            "torch._tensor _rebuild_from_type_v2",
            "torch.storage UntypedStorage",
            "torch.serialization _get_layout",
        ),
        *(f"torch.distributed.checkpoint.metadata {name}" for name in _DCP),
        *(
            f"torch.distributed.checkpoint.metadata Tensor{name}"
            for name in ("Properties", "StorageMetadata")
        ),
        "torch.distributed.checkpoint.metadata _MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem _StorageInfo",
        *(f"deepspeed.runtime.fp16.loss_scaler {name}" for name in ("LossScaler", "DynamicLossScaler")),
        "deepspeed.runtime.zero.config ZeroStageEnum",
        "deepspeed.utils.tensor_fragment fragment_address",
    }
)
"""What the two engines write (seen with torch 2.13 and DeepSpeed 0.19), and kinds of numbers."""


class _Inert:
    """Stands for every object of a pickle: takes all that is done to it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...


class _Names(pickle.Unpickler):
    """Collects the names that a pickle would import."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.found: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.found.add(f"{module} {name}")
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()


def unsafe_pickle(checkpoint: Path) -> str | None:
    """Names the first file that would run something unknown when FSDP2 or DeepSpeed loads it; `None`: none
    would."""
    latest = checkpoint / "latest"
    if latest.exists() and not _LATEST.fullmatch(latest.read_text(encoding="utf-8").strip()):
        return "latest names no global_step folder of this checkpoint"
    files = [*checkpoint.glob("*/.metadata"), *checkpoint.glob("global_step*/**/*.pt")]
    for path in sorted(files):
        try:
            unknown = _unknown(_names_in(path))
            if not unknown and path.name == ".metadata":
                unknown = _unknown(_names_beside(path))
        except Exception as error:  # a pickle that is none may fail in any way
            unknown = [f"{type(error).__name__}: {' '.join(str(error).split())}"]
        if unknown:
            return (
                f"{path.relative_to(checkpoint)} holds {unknown[0].replace(' ', '.', 1)}, which no "
                "checkpoint of this engine has, and loading it would run it"
            )
    return None


def _names_in(path: Path) -> set[str]:
    """What a pickle, or a file that torch has saved, would import."""
    with path.open("rb") as file:
        return _names(file) if path.name == ".metadata" else _names_of_archive(file)


def _names_beside(metadata: Path) -> set[str]:
    """What the values beside FSDP2's tensors would import. The metadata itself is known to be harmless.

    Raises:
        ValueError: it names files elsewhere, or asks for a transformation.
    """
    with metadata.open("rb") as file:
        content = pickle.load(file)
    found: set[str] = set()
    for index, place in content.storage_data.items():
        name = str(place.relative_path)
        if Path(name).name != name or getattr(place, "transform_descriptors", None):
            raise ValueError(f"a value of {name}")
        if isinstance(content.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            continue  # torch loads it with weights_only
        with (metadata.parent / name).open("rb") as file:
            file.seek(place.offset)
            found |= _names_of_archive(io.BytesIO(file.read(place.length)))
    return found


def _names_of_archive(file: IO[bytes]) -> set[str]:
    """The names in an archive of `torch.save`; TorchScript's and formats before torch 1.6 are refused."""
    if not zipfile.is_zipfile(file):
        raise ValueError("something that torch.save does not write")
    found: set[str] = set()
    with zipfile.ZipFile(file) as archive:
        members = [name for name in archive.namelist() if name.endswith(".pkl")]
        if any(not name.endswith("/data.pkl") for name in members):
            raise ValueError("something that torch.save does not write")
        for name in members:
            with archive.open(name) as member:
                found |= _names(member)
    return found


def _unknown(names: set[str]) -> list[str]:
    return sorted(name for name in names if name not in _KNOWN and not _TORCH.fullmatch(name))


def _names(file: IO[bytes]) -> set[str]:
    reader = _Names(file)
    reader.load()
    return reader.found
