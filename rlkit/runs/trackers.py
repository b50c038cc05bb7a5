"""Weights & Biases: a login that is checked before the run starts, and metrics outside of training steps."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from rlkit.errors import UserError, one_line


def check_wandb(report_to: Collection[str]) -> None:
    """Raise UserError if a run reports to W&B online and has no API key.

    transformers would notice when training begins, after the evaluation before it.

    Args:
        report_to: Trackers of the run.
    """
    if "wandb" not in report_to:
        return
    import wandb

    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    try:
        is_logged_in = wandb.login(prompt=False)
    except wandb.errors.Error as error:
        raise UserError(f"report_to wandb: {one_line(error)}") from error
    if not is_logged_in:
        raise UserError(
            "report_to wandb requires an API key: run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline"
        )


def log_to_wandb(metrics: dict[str, Any]) -> None:
    """Log metrics to the W&B run that is open, if any.

    W&B's sweeps compare runs by these. transformers' callback opens the W&B run when training begins, so
    there is none for the evaluation "before".
    """
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        run.log(metrics)
