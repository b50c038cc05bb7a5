"""Seal checkpoints and verify them: whether one is complete, and whether it belongs to this run.

The last file written to a checkpoint is a manifest with the sizes of all its files, and older checkpoints are
deleted only after that. Whenever the power fails, there is still one complete checkpoint, and an incomplete
one can be recognized.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkit.errors import UserError
from rlkit.files import atomic_write, sync

logger = logging.getLogger(__name__)

MANIFEST = "rlkit.json"


def seal(folder: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Mark a checkpoint as complete: flush its files to disk, then write the manifest.

    Args:
        folder: Folder of the checkpoint.
        step: Optimizer step of the checkpoint.
        identity: Config that a run must share to resume from it.
    """
    # A checkpoint that is being overwritten must not look complete because of its old manifest.
    (folder / MANIFEST).unlink(missing_ok=True)
    # Without fsync, a file system may write the small manifest to disk before the large weights.
    paths = sorted(folder.rglob("*"))
    for path in (*paths, folder):
        sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.is_file()}
    text = json.dumps({"step": step, "identity": dict(identity), "files": sizes}, indent=1)
    atomic_write(folder / MANIFEST, text)
    sync(folder.parent)  # otherwise the entry of a new folder may be lost
    logger.debug("checkpoint sealed: %s", folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete checkpoint.

    Raises:
        ValueError: The checkpoint is incomplete; the message says what is missing.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"it has no valid {MANIFEST}, which is written last") from None
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        actual_size = path.stat().st_size
        if actual_size != size:
            raise ValueError(f"{name} has {actual_size} of {size} bytes")
    return manifest


def last_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None if there are no checkpoints.

    Incomplete ones are skipped with a warning.

    Raises:
        UserError: All checkpoints are incomplete.
    """
    folders = checkpoints(run)
    for folder in sorted(folders, key=step_of, reverse=True):
        try:
            read_manifest(folder)
            return folder
        except ValueError as problem:
            logger.warning("skipping the incomplete checkpoint %s: %s", folder, problem)
    if folders:
        raise UserError(f"{run} has no complete checkpoint to resume from; start over with --overwrite")
    return None


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, in no particular order."""
    return [path for path in run.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of a checkpoint folder."""
    return int(checkpoint.name.split("-")[1])


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line `key: old -> new` for each difference between two identities.

    Args:
        saved: Identity in a checkpoint's manifest.
        now: Identity of the current run.
    """
    return [
        f"{key}: {_format_value(saved.get(key))} -> {_format_value(now.get(key))}"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key) != now.get(key)
    ]


def _format_value(value: object) -> str:
    """Format a value of an identity for people: `even=1.0, variety=0.5`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_format_value, value)) or "none"
    return "none" if value is None else str(value)
