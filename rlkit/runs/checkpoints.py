"""Seal checkpoints and verify them: whether one is complete, and whether it belongs to this run.

The last file written to a checkpoint is a manifest with the sizes of all its files, and older checkpoints are
deleted only after that, manifest first. Whenever the power fails, there is still one complete checkpoint, and
one that is not complete has no manifest.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkit.errors import UserError
from rlkit.files import atomic_write, sync

logger = logging.getLogger(__name__)

MANIFEST = "rlkit.json"


def seal(folder: Path, step: int, identity: Mapping[str, Any], num_metrics: int | None = None) -> None:
    """Mark a checkpoint as complete: flush its files to disk, then write the manifest.

    Args:
        folder: Folder of the checkpoint.
        step: Optimizer step of the checkpoint.
        identity: Config that a run must share to resume from it.
        num_metrics: Number of lines of `metrics.jsonl`; a run that resumes deletes the later ones. None if
            the run logs none.
    """
    # A checkpoint that is being overwritten must not look complete because of its old manifest.
    (folder / MANIFEST).unlink(missing_ok=True)
    # Without fsync, a file system may write the small manifest to disk before the large weights.
    paths = sorted(folder.rglob("*"))
    for path in (*paths, folder):
        sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.is_file()}
    manifest: dict[str, Any] = {"step": step, "identity": dict(identity), "files": sizes}
    if num_metrics is not None:
        manifest["num_metrics"] = num_metrics
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1))
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
        if type(manifest["step"]) is not int or not isinstance(manifest["identity"], dict):
            raise ValueError
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
    """Return the newest complete checkpoint of a run, or None if none was ever completed.

    Incomplete ones are skipped with a warning.

    Raises:
        UserError: A checkpoint was completed but has been damaged since, and no other is complete.
    """
    damages = []
    for folder in sorted(checkpoints(run), key=step_of, reverse=True):
        try:
            read_manifest(folder)
            return folder
        except ValueError as problem:
            logger.warning("skipping the incomplete checkpoint %s: %s", folder, problem)
            if (folder / MANIFEST).exists():
                damages.append(f"{folder} is damaged: {problem}")
    if damages:
        raise UserError(
            f"{damages[0]}, and there is no other complete checkpoint to resume from; restore it from a "
            "backup, or start over with --overwrite"
        )
    return None


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, so that it does not look complete if the deletion is interrupted."""
    (folder / MANIFEST).unlink(missing_ok=True)
    sync(folder)
    # Files that another process still has open cannot be deleted on NFS. They must not end the run.
    shutil.rmtree(folder, ignore_errors=True)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints of a run, and those of which an earlier deletion was interrupted.

    The newest and the best one are kept.

    Args:
        run: Run directory, whose newest checkpoint is complete.
        limit: Maximum number of checkpoints; None or 0 for no limit.
        best: Path of the best checkpoint, or None.
    """
    if not limit:
        return
    folders = sorted(checkpoints(run), key=step_of)
    complete = [folder for folder in folders if (folder / MANIFEST).exists()]
    protected = {complete[-1]} | {folder for folder in complete if best and folder == Path(best)}
    unprotected = [folder for folder in complete if folder not in protected]
    num_old = len(unprotected) - max(limit - len(protected), 0)
    for folder in folders:
        if folder not in complete or folder in unprotected[: max(num_old, 0)]:
            delete_checkpoint(folder)


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, in no particular order; other names are not the run's own."""
    return [
        path
        for path in run.glob("checkpoint-*")
        if re.fullmatch("checkpoint-[0-9]+", path.name) and path.is_dir()
    ]


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
