"""Imported once, in the server that ranks are forked from: each rank would spend ten seconds on it."""

import importlib
import os

os.environ.update(
    DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true"
)

for name in (
    "deepspeed",
    "datasets",
    "accelerate.commands.launch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "chunkdist.train.build",
    "chunkdist.train.reports.callback",
    "chunkdist.check.gradients",
    "chunkdist.pipeline.step",
    "tests.distributed.cases",
):
    importlib.import_module(name)
