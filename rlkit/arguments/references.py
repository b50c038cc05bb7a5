"""Checks of the classes, folders and files that keys refer to, before torch or TRL is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlkit.errors import UserError, check_arguments, check_choice
from rlkit.models.names import check_folder, check_model_name
from rlkit.registry import ENVIRONMENTS, environment_class


def check_references(command: str, keys: Mapping[str, Any]) -> None:
    """Raise UserError if a key names something that does not exist.

    The class of the environment is imported, but no environment is built: that may take long or need a
    server.

    Args:
        command: "train", "sft" or "rank".
        keys: Valid values by key; `environment` is set.
    """
    environment = str(keys["environment"])
    if ":" not in environment:
        check_choice("environment", environment, ENVIRONMENTS)
    rewards = keys.get("rewards") or []
    if not isinstance(rewards, list):
        rewards = [rewards]
    for reference in [environment, *rewards]:
        file, _, _ = str(reference).rpartition(":")
        if file.endswith(".py") and not Path(file).expanduser().is_file():
            raise UserError(f"there is no file {file!r}")
    check_arguments(environment_class(environment), keys.get("environment_args") or {})
    if model := str(keys.get("model_name_or_path") or ""):
        # The folder of an encoder has other files.
        check_folder(model) if command == "rank" else check_model_name(model)
    file, colon, _ = str(keys.get("fold") or "").rpartition(":")
    if colon:
        _check_file("fold", file)
    kind, _, file = str(keys.get("demonstrations")).partition(":")
    if kind == "best":
        _check_file("demonstrations", file)


def _check_file(key: str, file: str) -> None:
    """Raise UserError unless a file that a key names exists."""
    if not Path(file).is_file():
        raise UserError(f"{key}: {file or 'an empty path'} is {_kind(Path(file))}; name a file")


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "missing"
