"""A GPU that torch cannot use is not passed over in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chunkdist.train.launch.usable_gpu import refuse_idle_gpu, try_first_kernel, why_gpu_is_idle
from chunkdist.train.options.arguments import parse_options

DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (root@host)\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a card, whose torch sees none."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(DRIVER.format("550.54.15"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_an_old_driver(root: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"needs driver 580 or newer, and this one is 550\.54\.15"
    ) as found:
        refuse_idle_gpu(root)
    assert "--index-url https://download.pytorch.org/whl/cu126 (driver 525 and newer)" in str(found.value)
    assert str(found.value).endswith("or write use_cpu: true to train on the CPU")


def test_other_reasons(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "is false with driver 550.54.15" in str(why_gpu_is_idle(root))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in str(why_gpu_is_idle(root))


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUDA_VISIBLE_DEVICES", ""), ("ACCELERATE_USE_CPU", "True"), ("DS_ACCELERATOR", "cpu")],
)
def test_the_cpu_was_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    refuse_idle_gpu(root)


def test_no_card_or_one_that_is_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert why_gpu_is_idle(root) is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    (root / "dev/nvidia0").unlink()
    assert why_gpu_is_idle(root) is None


def test_the_launcher_asks_unless_told_to_use_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("an idle GPU")

    monkeypatch.setattr("chunkdist.train.options.run_arguments.refuse_idle_gpu", refuse)
    arguments = ["--config", "configs/quickstart.yaml", "--report_to", "none", "--tf32", "false"]
    with pytest.raises((RuntimeError, ValueError), match="an idle GPU"):
        parse_options(arguments)
    assert parse_options([*arguments, "--use_cpu", "true"]).training.use_cpu


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "CUDA error: no kernel image is available for execution",
            r"sm_70; it is built for sm_80.*whl/cu126",
        ),
        ("CUDA error: out of memory", "no memory left for the first kernel"),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "no memory left"),
        (
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
            "another process has it for itself",
        ),
        ("CUDA error: unknown error", "the first kernel on cpu failed .*chunkdist doctor"),
    ],
)
def test_a_first_kernel_that_fails(monkeypatch: pytest.MonkeyPatch, said: str, expected: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{said}\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    with pytest.raises(RuntimeError, match=expected):
        try_first_kernel(torch.device("cpu"))


def test_a_first_kernel_that_runs() -> None:
    try_first_kernel(torch.device("cpu"))
