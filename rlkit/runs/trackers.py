"""Weights & Biases: the login, the id of the W&B run, and metrics that no training step logs."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlkit.errors import UserError, one_line
from rlkit.files import atomic_write


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


@contextmanager
def continued_wandb_run(folder: Path, report_to: Collection[str]) -> Iterator[None]:
    """Make training in the block log to the same W&B run each time a run is resumed.

    transformers would start another W&B run each time. The id is in the file `wandb_id` of the run directory.
    `WANDB_RUN_ID` and a W&B run that is active already take precedence.

    Args:
        folder: Run directory.
        report_to: Names of the trackers that the trainer reports to.
    """
    if "wandb" not in report_to or "WANDB_RUN_ID" in os.environ or _active_run() is not None:
        yield
        return
    path = folder / "wandb_id"
    if not path.exists():
        atomic_write(path, secrets.token_hex(8))
    settings = {"WANDB_RUN_ID": path.read_text(encoding="utf-8"), "WANDB_RESUME": "allow"}
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    if "wandb" in sys.modules:
        # W&B reads the environment only once in a process, for `check_wandb` or another call before.
        sys.modules["wandb"].teardown()
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def log_to_wandb(metrics: dict[str, Any]) -> None:
    """Log metrics to the active W&B run, if any.

    W&B's sweeps compare runs by these. transformers' callback starts the W&B run when training begins, so
    there is none for the evaluation "before".
    """
    run = _active_run()
    if run is not None:
        run.log(metrics)


def _active_run() -> Any:
    """Return the active W&B run, or None, without importing wandb."""
    return getattr(sys.modules.get("wandb"), "run", None)
