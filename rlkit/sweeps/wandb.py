"""Export of a sweep to W&B: a file for `wandb sweep`, whose agents run `rlkit train` unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rlkit.errors import UserError
from rlkit.files import atomic_write
from rlkit.sweeps.spec import Sweep, grid_values

METHODS = {"grid": "grid", "random": "random", "optuna": "bayes"}


def write_sweep(sweep: Sweep, metric: str) -> Path:
    """Write `wandb.yaml` to the sweep's folder and return its path.

    Args:
        sweep: Sweep to export.
        metric: Name of the environment's metric, which runs log as `evaluation/<metric>`.

    Raises:
        UserError: If W&B's agents cannot run the sweep.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / "wandb.yaml"
    atomic_write(path, yaml.safe_dump(as_wandb(sweep, metric), sort_keys=False))
    return path


def as_wandb(sweep: Sweep, metric: str) -> dict[str, Any]:
    """Return the content of W&B's sweep file."""
    if sweep.objective not in (None, metric):
        # A run logs its environment's metric alone; the held-out means of single rewards are not logged.
        raise UserError(
            f"W&B can compare only the metric that runs log, evaluation/{metric}: "
            f"remove objective ({sweep.objective})"
        )
    for key, domain in sweep.keys.items():
        if isinstance(domain, list) and any(isinstance(value, list | dict) for value in domain):
            raise UserError(f"{key}: W&B agents cannot pass lists or mappings; use another launcher")
    parameters = {key: _parameter(sweep, domain) for key, domain in sweep.keys.items()}
    parameters["seed"] = {"values": sweep.seeds}
    launcher = []
    if sweep.accelerate:
        launcher += ["--accelerate", sweep.accelerate]
    if sweep.num_processes:
        launcher += ["--num_processes", str(sweep.num_processes)]
    content: dict[str, Any] = {
        "name": sweep.folder.name,
        "method": METHODS[sweep.search],
        "metric": {"name": f"evaluation/{metric}", "goal": sweep.direction},
        "parameters": parameters,
        "command": [
            "${env}", "rlkit", sweep.command, sweep.base, *launcher, "--report_to=wandb", "--output_dir",
            f"{sweep.folder}/wandb-${{envvar:WANDB_RUN_ID}}", "${args}",
        ],
    }  # fmt: skip
    if sweep.search != "grid":
        content["run_cap"] = sweep.trials * len(sweep.seeds)
    return content


def _parameter(sweep: Sweep, domain: list[Any] | dict[str, Any]) -> dict[str, Any]:
    if isinstance(domain, list):
        return {"values": domain}
    if "step" in domain and sweep.search == "grid":
        return {"values": grid_values("", domain)}
    low, high = domain["low"], domain["high"]
    bounds = {"min": low, "max": high}
    if "step" in domain:
        return {"distribution": "q_uniform", "q": domain["step"], **bounds}
    if domain.get("log"):
        return {"distribution": "log_uniform_values", **bounds}
    has_integer_bounds = isinstance(low, int) and isinstance(high, int)
    return {"distribution": "int_uniform" if has_integer_bounds else "uniform", **bounds}
