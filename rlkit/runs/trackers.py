"""Weights & Biases: a login that is checked before the run starts, and metrics outside of training steps."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from typing import Any

from rlkit.errors import UserError, one_line


def check_wandb(report_to: Collection[str]) -> None:
    """Raise UserError if a run reports to W&B but cannot log in; without a login, training would not start.

    Args:
        report_to: Trackers of the run.
    """
    if "wandb" not in report_to or os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise UserError(
            f"report_to wandb: {one_line(error)} Without a network, set the environment variable "
            "WANDB_MODE=offline."
        ) from error


def log_to_wandb(metrics: dict[str, Any]) -> None:
    """Log metrics to the W&B run that is open, if any.

    W&B's sweeps compare runs by these. transformers' callback opens the W&B run when training begins, so
    there is none for the evaluation "before".
    """
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        run.log(metrics)
