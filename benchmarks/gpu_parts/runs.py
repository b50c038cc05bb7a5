"""Runs of `rlkit train` on models with random weights, for the parts `smoke` and `memory`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gpu_parts.common import Bench, make_tokenizer

ENVIRONMENT = f"{Path(__file__).resolve().parents[1] / 'fixed_prompts.py'}:RandomLetters"


def save_model(bench: Bench, name: str, folder: Path, **options: Any) -> None:
    """Save a model of `common.MODEL_CONFIGS` in bfloat16, with its tokenizer; options change its config."""
    model = bench.model(name, torch.bfloat16, **options)
    model.save_pretrained(folder)
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)


def train_argv(
    bench: Bench, model: Path, output: Path, *, shape: tuple[int, int, int], **keys: Any
) -> list[str]:
    """Return the arguments of `rlkit train` for a run without evaluations.

    Args:
        bench: Device of the run.
        model: Folder of the model.
        output: Run directory.
        shape: Prompt tokens, completion tokens, rollouts per prompt. All completions have this length.
        keys: Additional keys of the config.
    """
    prompt, completion, group = shape
    keys = {
        "model_name_or_path": model,
        "output_dir": output,
        "environment": ENVIRONMENT,
        "environment_args": json.dumps({"length": prompt}),
        "generation_kwargs": json.dumps({"min_new_tokens": completion}),
        "max_completion_length": completion,
        "num_generations": group,
        "per_device_train_batch_size": group,
        "use_cpu": bench.on_cpu,
        "bf16": True,
        "gradient_checkpointing": False,
        "evaluation_tasks": 0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        **keys,
    }
    argv = []
    for key, value in keys.items():
        argv += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return argv


def run(argv: list[str], *, code: str | None = None) -> str:
    """Run `rlkit train` in a process and return its output; raise RuntimeError if it fails.

    Args:
        argv: Arguments of the command.
        code: Python code to run instead of the command, with the same arguments, or None.
    """
    command = [sys.executable, "-m", "rlkit", "train"] if code is None else [sys.executable, "-c", code]
    process = subprocess.run([*command, *argv], capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError((process.stderr or process.stdout)[-1500:])
    return process.stdout
