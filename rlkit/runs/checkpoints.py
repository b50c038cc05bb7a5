"""Whether a checkpoint was written completely, and whether it belongs to this run.

A checkpoint is sealed last, by a manifest with the size of each of its files; older ones are deleted only
after that. So whenever the power fails, one complete checkpoint is left, and one that was cut short is known.
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
    """Declare a checkpoint whole: everything is on the disk before the manifest says so."""
    # A checkpoint that is written again is incomplete until its new manifest is there.
    (folder / MANIFEST).unlink(missing_ok=True)
    paths = sorted(folder.rglob("*"))
    for path in (*paths, folder):
        sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.is_file()}
    text = json.dumps({"step": step, "identity": dict(identity), "files": sizes}, indent=1)
    atomic_write(folder / MANIFEST, text)
    sync(folder.parent)
    logger.debug("checkpoint sealed: %s", folder)


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint; raises ValueError saying what is missing."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        files = dict(found["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError("it was not finished") from None
    for name, size in files.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            raise ValueError(
                f"{name} has {actual} of {size} bytes" if path.is_file() else f"{name} is missing"
            )
    return found


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; those cut short are skipped with a warning.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    folders = checkpoints(run)
    for folder in sorted(folders, key=step_of, reverse=True):
        try:
            manifest(folder)
            return folder
        except ValueError as problem:
            logger.warning("%s is cut short and skipped: %s", folder, problem)
    if folders:
        raise UserError(f"{run} has no whole checkpoint to go on from: --overwrite starts anew")
    return None


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, in no order."""
    return [path for path in run.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of a checkpoint folder."""
    return int(checkpoint.name.split("-")[1])


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was in the run that wrote a checkpoint, a line each."""
    return [
        f"{key}: {_say(saved.get(key))} -> {_say(now.get(key))}"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key) != now.get(key)
    ]


def _say(value: object) -> str:
    """A value of an identity as a person would write it: `even=1.0, variety=0.5`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_say(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_say, value)) or "none"
    return "none" if value is None else str(value)
