"""The names of models: on the Hub, a folder, or `bundled:smollm2-135m`. Nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path

from rlkit.errors import UserError
from rlkit.models.bundled import PREFIX, bundled_path, check_bundled

MODEL_FILES = ("config.json", "adapter_config.json")  # a model folder has the first, an adapter the second


def resolve(name: str | None) -> str:
    """Return the name or the path of a model for `from_pretrained`, with `~` and `bundled:` resolved.

    Raises:
        UserError: No model is given, or the path is not a model folder.
    """
    name = check_model_name(name)
    if name.startswith(PREFIX):
        return str(bundled_path(name))
    return str(Path(name).expanduser()) if name.startswith("~") else name


def check_model_name(name: str | None) -> str:
    """Return the name of a model after checks that need no network; a name on the Hub may not exist.

    Raises:
        UserError: No model is given, there is no such bundled model, or the path is not a model folder.
    """
    if not name:
        raise UserError("no model given: set the key 'model_name_or_path', e.g. bundled:smollm2-135m")
    if name.startswith(PREFIX):
        check_bundled(name)
        return name
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UserError(f"cannot load {name!r}: it is a file; give the folder of the model")
    check_folder(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in MODEL_FILES):
        raise UserError(f"cannot load {name!r}: the folder has no {' or '.join(MODEL_FILES)}")
    return name


def check_folder(name: str) -> None:
    """Raise UserError if the name of a model is a path that does not exist, not a name on the Hub."""
    if name.startswith((".", "/", "~", "runs/")) and not Path(name).expanduser().is_dir():
        # Without this check, transformers would look for the path on the Hub.
        raise UserError(f"there is no model folder {name!r}: train it first, or set model_name_or_path")
