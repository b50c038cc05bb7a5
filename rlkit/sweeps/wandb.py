"""A sweep as W&B's own: a file for `wandb sweep`, whose agents run `rlkit train` unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rlkit.errors import UserError
from rlkit.files import atomic_write
from rlkit.sweeps.spec import Sweep, values_of

METHODS = {"grid": "grid", "random": "random", "optuna": "bayes"}


def write_sweep(sweep: Sweep, metric: str) -> Path:
    """Write the file and return its path; raises UserError where W&B cannot say it.

    Args:
        metric: name of the environment's metric, which runs log as `evaluation/<metric>`.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / "wandb.yaml"
    atomic_write(path, yaml.safe_dump(as_wandb(sweep, metric), sort_keys=False))
    return path


def as_wandb(sweep: Sweep, metric: str) -> dict[str, Any]:
    """The keys of a W&B sweep."""
    if sweep.objective not in (None, metric):
        raise UserError(f"W&B compares what a run logs, evaluation/{metric}: leave out objective")
    for key, one in sweep.keys.items():
        if isinstance(one, list) and any(isinstance(value, list | dict) for value in one):
            raise UserError(f"{key}: W&B's agents cannot pass lists and mappings: use another launcher")
    parameters = {key: _parameter(sweep, one) for key, one in sweep.keys.items()}
    parameters["seed"] = {"values": sweep.seeds}
    several = ["--accelerate", sweep.accelerate] if sweep.accelerate else []
    several += ["--num_processes", str(sweep.num_processes)] if sweep.num_processes else []
    found: dict[str, Any] = {
        "name": sweep.folder.name,
        "method": METHODS[sweep.search],
        "metric": {"name": f"evaluation/{metric}", "goal": sweep.direction},
        "parameters": parameters,
        "command": [
            "${env}", "rlkit", sweep.command, sweep.base, *several, "--report_to=wandb", "--output_dir",
            f"{sweep.folder}/wandb-${{envvar:WANDB_RUN_ID}}", "${args}",
        ],
    }  # fmt: skip
    if sweep.search != "grid":
        found["run_cap"] = sweep.trials * len(sweep.seeds)
    return found


def _parameter(sweep: Sweep, one: list[Any] | dict[str, Any]) -> dict[str, Any]:
    if isinstance(one, list):
        return {"values": one}
    whole = all(isinstance(one[end], int) for end in ("low", "high"))
    if "step" in one and sweep.search == "grid":
        return {"values": values_of("", one)}
    if "step" in one:
        return {"distribution": "q_uniform", "q": one["step"], "min": one["low"], "max": one["high"]}
    if one.get("log"):
        return {"distribution": "log_uniform_values", "min": one["low"], "max": one["high"]}
    return {"distribution": "int_uniform" if whole else "uniform", "min": one["low"], "max": one["high"]}
