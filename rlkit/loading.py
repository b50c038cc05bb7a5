"""Objects by the text that names them: `package.module:Name`, `path/to/file.py:Name`; keys of YAML files."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rlkit.errors import UserError, nearest


def load_object(reference: str) -> Any:
    """Import the object that `reference` names.

    Args:
        reference: `package.module:Name` or `path/to/file.py:Name`.

    Raises:
        UserError: the text has no colon, the module or file is missing, or it has no such name.
            Errors inside the module itself are not caught: their traceback is what the author needs.
    """
    source, colon, name = reference.rpartition(":")
    if not colon or not source or not name:
        raise UserError(f"cannot load {reference!r}: write 'package.module:Name' or 'path/file.py:Name'")
    module = _load_file(source) if source.endswith(".py") else _load_module(source)
    if not hasattr(module, name):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise UserError(f"{source} has no {name!r}{nearest(name, public)}")
    return getattr(module, name)


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(f"there is no module {name!r}: is it installed, or on PYTHONPATH?") from error
        raise


def _load_file(file: str) -> ModuleType:
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"there is no file {file!r}")
    # One module object per file, so that loading two names from a file runs it once.
    name = "rlkit_file_" + "".join(c if c.isalnum() else "_" for c in str(path.with_suffix("")))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # always so for a .py file that exists
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; raises UserError with the line of a mistake."""
    import yaml  # environments are loaded without it

    try:
        keys = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict):
        raise UserError(f"{path} must hold keys and values")
    return keys
