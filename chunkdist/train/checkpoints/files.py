"""What a checkpoint's files say about it: whether they are all there, which engine wrote them, on how many
ranks.

A list of the files, their sizes and checksums (xxh3) is written into the checkpoint before it gets its name.
Checkpoints of other programs have none; of them, the files without which a run could not go on are asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from chunkdist.train.checkpoints.pickles import unsafe_pickle
from chunkdist.train.launch.ranks import FSDP, PIPELINE, UNSHARDED, ZERO3, ZERO12

FILE_LIST = "chunkdist_files.json"
_ZERO_STATES = "global_step*/*zero_pp_rank_*_mp_rank_00_optim_states.pt"
_ZERO3_WEIGHTS = "global_step*/*zero_pp_rank_*_mp_rank_00_model_states.pt"
_OPTIMIZERS = {
    UNSHARDED: ("optimizer.pt",),
    FSDP: ("optimizer_0/.metadata", "optimizer.bin"),
    PIPELINE: ("optimizer_rank0.pt",),
}
_BLOCK_BYTES = 2**22
_RUNS_CODE = {".pt", ".pth", ".bin", ".pkl", ".distcp"}
"""Endings of pickled files: one that is not listed was not written with the others."""
_FSDP_WEIGHTS = ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")


def list_files(checkpoint: Path, num_ranks: int) -> None:
    """Writes the list, into a checkpoint that has not got its name yet."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != FILE_LIST]
    names = [str(path.relative_to(checkpoint)) for path in files]
    sizes = dict(zip(names, (path.stat().st_size for path in files), strict=True))
    sums = dict(zip(names, checksums(files), strict=True))
    text = json.dumps({"num_ranks": num_ranks, "bytes": sizes, "xxh3": sums}, indent=1)
    (checkpoint / FILE_LIST).write_text(text, encoding="utf-8")


def checksums(files: Sequence[Path]) -> list[str]:
    """The xxh3 sums, some files at a time: hashing leaves the interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_checksum, files))


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fault_of(checkpoint: Path) -> str | None:
    """Why a run cannot go on from a checkpoint, which is read to its end for that; `None`: it can."""
    return (
        _unreadable(checkpoint / TRAINER_STATE_NAME, "global_step")
        or _damage(checkpoint)
        or _missing(checkpoint)
        or unsafe_pickle(checkpoint)
    )


def engine_of(checkpoint: Path) -> str | None:
    """The engine that has written the optimizer's states, as `engine_name` has it; `None`: there are none."""
    if list(checkpoint.glob(_ZERO_STATES)):
        return ZERO3 if list(checkpoint.glob(_ZERO3_WEIGHTS)) else ZERO12
    for engine, names in _OPTIMIZERS.items():
        if any((checkpoint / name).exists() for name in names):
            return engine
    return None


def num_ranks_of(checkpoint: Path) -> int:
    """By how many ranks it was saved."""
    if (checkpoint / FILE_LIST).exists():
        return int(json.loads((checkpoint / FILE_LIST).read_text(encoding="utf-8"))["num_ranks"])
    return max(1, len(zero_states(checkpoint)), len(_random_states(checkpoint)))


def zero_states(checkpoint: Path) -> list[Path]:
    """DeepSpeed's optimizer states, one file a rank."""
    return sorted(checkpoint.glob(_ZERO_STATES))


def _unreadable(path: Path, *keys: str) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {path.name}"
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {' '.join(str(error).split())}"
    if not isinstance(content, dict) or any(key not in content for key in keys):
        return f"{path} holds no {' and '.join(keys)}"
    return None


def _damage(checkpoint: Path) -> str | None:
    """What differs from the list of files."""
    if not (checkpoint / FILE_LIST).exists():
        return None
    unreadable = _unreadable(checkpoint / FILE_LIST, "num_ranks", "bytes")
    if unreadable is not None:
        return unreadable
    listed = json.loads((checkpoint / FILE_LIST).read_text(encoding="utf-8"))
    for name, num_bytes in listed["bytes"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != num_bytes:
            return f"{name} has {path.stat().st_size} bytes and had {num_bytes} when it was saved"
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        is_converted = "_universal" in name  # by DeepSpeed's script, after it was saved
        is_pickle = path.suffix in _RUNS_CODE or path.name == ".metadata"
        if is_pickle and name not in listed["bytes"] and path.is_file() and not is_converted:
            return f"{name} is not one of the files that were saved"
    sums = listed.get("xxh3", {})  # lists of earlier versions have none
    found = checksums([checkpoint / name for name in sums])
    for (name, expected), checksum in zip(sums.items(), found, strict=True):
        if checksum != expected:
            return f"{name} is not what was saved: its checksum differs"
    return None


def _missing(checkpoint: Path) -> str | None:
    if engine_of(checkpoint) is None:
        held = (
            "weights" if any(checkpoint.glob("*.safetensors")) or _has_fsdp_weights(checkpoint) else "files"
        )
        return f"it has {held} but no optimizer state (saved with save_only_model: true?)"
    if engine_of(checkpoint) == FSDP and not _has_fsdp_weights(checkpoint):
        return f"it has no {_FSDP_WEIGHTS[0]}"
    if not (checkpoint / SCHEDULER_NAME).exists():
        return f"it has no {SCHEDULER_NAME}"
    found, num_ranks = _random_states(checkpoint), num_ranks_of(checkpoint)
    if not found:
        return "it has no rng_state file"
    if (checkpoint / "rng_state.pth").exists():
        return None
    absent = [rank for rank in range(max(2, num_ranks, *found)) if rank not in found]
    if absent:
        return f"rng_state_{absent[0]}.pth is missing"
    of_zero = {_rank_of(path) for path in zero_states(checkpoint)}
    absent = [rank for rank in range(num_ranks) if rank not in of_zero] if of_zero else []
    return f"the ZeRO optim_states file of rank {absent[0]} is missing" if absent else None


def _has_fsdp_weights(checkpoint: Path) -> bool:
    return any((checkpoint / name).exists() for name in _FSDP_WEIGHTS)


def _random_states(checkpoint: Path) -> list[int]:
    """The ranks whose random states are there; one process writes `rng_state.pth`."""
    ranks = [re.fullmatch(r"rng_state_(\d+)\.pth", path.name) for path in checkpoint.glob("rng_state_*.pth")]
    numbered = sorted(int(match[1]) for match in ranks if match)
    return numbered or ([0] if (checkpoint / "rng_state.pth").exists() else [])


def _rank_of(zero_state: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", zero_state.name)
    assert match is not None
    return int(match[1])
