"""The memory that `rlkit train --dry_run` predicts, and the peak of the same run."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import memory_plan
import torch

from gpu_parts.common import GIB, Bench, Cases
from gpu_parts.runs import run, save_model, train_argv

LORA = {"use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear", "dtype": "bfloat16"}
FULL = {"dtype": "float32"}
# Model, prompt tokens, completion tokens, rollouts, and keys of the config.
RUNS: dict[str, tuple[str, tuple[int, int, int], dict[str, Any]]] = {
    "0.6B full": ("qwen3-0.6b", (512, 256, 8), FULL),
    "0.6B full, long completions": ("qwen3-0.6b", (256, 1024, 8), FULL),
    "0.6B full, checkpointing": ("qwen3-0.6b", (512, 256, 32), FULL | {"gradient_checkpointing": True}),
    "0.6B full, reference model": ("qwen3-0.6b", (512, 256, 8), FULL | {"beta": 0.04}),
    "4B LoRA": ("qwen3-4b", (512, 256, 8), LORA),
    "4B LoRA, checkpointing": ("qwen3-4b", (512, 256, 16), LORA | {"gradient_checkpointing": True}),
}
TINY_SHAPE = (16, 8, 4)
# Prints what PyTorch's allocator held (it returns nothing to the GPU), and what all processes have taken.
TRAIN = """
import json, sys, torch
from rlkit.commands.train import main
main(sys.argv[1:])
free, total = torch.cuda.mem_get_info()
print("measured", json.dumps({
    "tensors_peak": torch.cuda.max_memory_allocated(),
    "reserved_peak": torch.cuda.max_memory_reserved(),
    "reserved": torch.cuda.memory_reserved(),
    "taken": total - free,
}))
"""


def cases(bench: Bench) -> Cases:
    """Return a case per run; the models are saved once, in a folder that is deleted with the process."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    @cache
    def model_folder(model: str) -> Path:
        path = Path(folder.name) / model
        save_model(bench, model, path)
        return path

    return {name: partial(measure, bench, model_folder, Path(folder.name), name) for name in RUNS}


def measure(bench: Bench, model_folder: Callable[[str], Path], folder: Path, name: str) -> dict[str, Any]:
    """Compare the predicted with the measured peak of two steps."""
    model, shape, keys = RUNS[name]
    shape = bench.size(shape, TINY_SHAPE)
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)  # the last run
    argv = train_argv(bench, model_folder(model), output, shape=shape, max_steps=2, **keys)
    bench.free()  # this process has built the model
    result: dict[str, Any] = {"model": model, "shape": shape, "keys": keys}
    if bench.on_cpu:
        peak = memory_plan.measure(argv)
    else:
        free, total = torch.cuda.mem_get_info()  # this process has a CUDA context, too
        measured = json.loads(run(argv, code=TRAIN).rpartition("measured")[2])
        # CUDA context and workspaces of the run
        non_allocator = measured["taken"] - (total - free) - measured["reserved"]
        peak = measured["reserved_peak"] + non_allocator
        result["tensors_peak_gib"] = round(measured["tensors_peak"] / GIB, 2)
        result["non_allocator_gib"] = round(non_allocator / GIB, 2)
    predicted = memory_plan.predict(argv, on_cpu=bench.on_cpu)
    return result | {
        "measured_gib": round(peak / GIB, 2),
        "predicted_gib": round(predicted / GIB, 2),
        "predicted_to_measured": round(predicted / peak, 3),
    }
