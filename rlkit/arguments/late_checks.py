"""Checks of values that the libraries reject only after the model is loaded, some with a traceback."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path

from rlkit.arguments.unused_keys import is_true
from rlkit.errors import UserError, nearest

# Packages of `report_to`, by import name. azure_ml and kubeflow have none of their own.
TRACKERS = {
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "trackio": "trackio",
    "wandb": "wandb",
}
# Arguments of torch.utils.checkpoint that a config can express.
CHECKPOINT_ARGUMENTS = ("debug", "determinism_check", "early_stop", "preserve_rng_state", "use_reentrant")
DEEPSPEED_BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu")
DEEPSPEED_SECTIONS = ("bf16", "fp16", "optimizer", "scheduler", "zero_optimization")


def check_late_keys(keys: Mapping[str, object]) -> None:
    """Raise UserError for the first value that a library would reject late.

    Args:
        keys: Values by key that are valid for their types.
    """
    trackers = keys.get("report_to")
    for tracker in trackers if isinstance(trackers, list) else [trackers]:
        if str(tracker) in TRACKERS:
            _check_package(f"report_to {tracker}", TRACKERS[str(tracker)])
    if is_true(keys.get("use_liger_kernel")):
        _check_package("use_liger_kernel", "liger_kernel")
    patterns = keys.get("lora_target_modules")
    patterns = patterns if isinstance(patterns, list) else [patterns]
    if len(patterns) == 1 and isinstance(patterns[0], str):  # PEFT matches a single name as a pattern
        try:
            re.compile(patterns[0])
        except re.error as error:
            raise UserError(
                f"lora_target_modules {patterns[0]!r} is not a valid regular expression: {error}"
            ) from error
    for part in str(keys["optim_args"]).split(",") if keys.get("optim_args") else ():
        if part.count("=") != 1:
            raise UserError(f"optim_args must be name=value pairs with commas between, not {part!r}")
    options = keys.get("gradient_checkpointing_kwargs")
    for name in options if isinstance(options, dict) else ():
        if name not in CHECKPOINT_ARGUMENTS:
            raise UserError(
                f"gradient_checkpointing_kwargs has no argument {name!r}{nearest(name, CHECKPOINT_ARGUMENTS)}"
            )
    _check_loading(keys)
    if keys.get("deepspeed"):
        _check_deepspeed(keys["deepspeed"])


def _check_loading(keys: Mapping[str, object]) -> None:
    """Raise UserError for settings of data loading or attention that cannot be used in training."""
    num_workers = keys.get("dataloader_num_workers")
    if is_true(keys.get("dataloader_persistent_workers")) and str(num_workers or 0) == "0":
        raise UserError("dataloader_persistent_workers requires a dataloader_num_workers above 0")
    attention = str(keys.get("attn_implementation") or "")
    if attention.startswith("paged|"):
        kernel = attention.removeprefix("paged|")
        raise UserError(f"attn_implementation {attention!r} is for inference only: use {kernel!r}")


def _check_package(setting: str, package: str) -> None:
    """Raise UserError if the package that a setting requires is not installed."""
    spec = importlib.util.find_spec(package)
    # A folder without __init__.py, such as the ./wandb that W&B writes to, has no origin.
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise UserError(f"{setting} requires the package {name}: pip install {name}")


def _check_deepspeed(value: object) -> None:
    """Raise UserError if a config of DeepSpeed, or the JSON file of one, lacks what a run needs."""
    settings = json.loads(Path(value).read_text(encoding="utf-8")) if isinstance(value, str) else value
    assert isinstance(settings, Mapping)
    for name in DEEPSPEED_SECTIONS:
        if not isinstance(settings.get(name, {}), Mapping):
            raise UserError(f"deepspeed: {name} must be a mapping, not {settings[name]!r:.60}")
    if not any(name in settings for name in DEEPSPEED_BATCH_SIZES):
        raise UserError(
            "deepspeed has no batch size; add train_micro_batch_size_per_gpu: auto and "
            "gradient_accumulation_steps: auto, which take the values of the run"
        )
