"""Environments, rewards and other objects by name; configs by path."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rlkit.environment import Environment
from rlkit.errors import UserError, check_arguments, nearest

PACKAGE = Path(__file__).parent

# Our own environments. Anything else is "package.module:Class" or "path/file.py:Class".
ENVIRONMENTS = {
    "causal-v1": "rlkit.envs.causal:CausalEnvironment",
    "intent-v1": "rlkit.envs.ranking:IntentEnvironment",
    "math-v1": "rlkit.envs.math:MathEnvironment",
    "navigate-v1": "rlkit.envs.ranking:NavigateEnvironment",
    "query-v1": "rlkit.envs.ranking:QueryEnvironment",
    "rerank-v1": "rlkit.envs.ranking:RerankEnvironment",
    "search-v1": "rlkit.envs.search:SearchEnvironment",
    "simulator-v1": "rlkit.envs.simulator:SimulatorEnvironment",
}

# Rewards of `rewards/` that suit every environment, by their short names.
REWARDS = {
    "arora_zanette": "rlkit.rewards.length_group:arora_zanette",
    "cosine": "rlkit.rewards.length:cosine",
    "dast": "rlkit.rewards.length_group:dast",
    "grpo_lead": "rlkit.rewards.length_group:grpo_lead",
    "hapo": "rlkit.rewards.hapo:HistoryLength",
    "kimi": "rlkit.rewards.length_group:kimi",
    "l1_exact": "rlkit.rewards.length:l1_exact",
    "l1_max": "rlkit.rewards.length:l1_max",
    "laser": "rlkit.rewards.length:laser",
    "o1_pruner": "rlkit.rewards.length:o1_pruner",
    "soft_overlong": "rlkit.rewards.length:soft_overlong",
    "think_prune": "rlkit.rewards.length:think_prune",
}


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
            hint = "is it installed, or on PYTHONPATH?"
            ours = PACKAGE / Path(*name.split("."))  # a module or a package
            if name.startswith(("envs.", "rewards.")) and (
                ours.with_suffix(".py").is_file() or ours.is_dir()
            ):
                hint = f"did you mean 'rlkit.{name}'?"
            raise UserError(f"there is no module {name!r}: {hint}") from error
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


def find_config(path: str | Path) -> Path:
    """Return the path of a config; `configs/...` that is not in the working directory comes with rlkit."""
    path = Path(path)
    if not path.exists() and path.parts[:1] == ("configs",) and (PACKAGE / path).is_file():
        return PACKAGE / path
    return path


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; raises UserError with the line of a mistake."""
    import yaml  # environments are loaded without it

    path = find_config(path)
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict):
        raise UserError(f"{path} must hold keys and values")
    return keys


def load_environment(name: str, **kwargs: Any) -> Environment:
    """Build an environment from its id, `package.module:Class` or `path/file.py:Class`.

    Raises:
        UserError: no such environment, or arguments that its constructor does not take.
    """
    cls = environment_class(name)
    check_arguments(cls, kwargs)
    return cls(**kwargs)


def environment_class(name: str) -> type[Environment]:
    """Return the class of an environment, by the same names; raises UserError."""
    if ":" not in name and name not in ENVIRONMENTS:
        raise UserError(f"there is no environment {name!r}{nearest(name, ENVIRONMENTS)}")
    cls = load_object(ENVIRONMENTS.get(name, name))
    if not (isinstance(cls, type) and issubclass(cls, Environment)):
        raise UserError(f"{name} is not a subclass of rlkit.environment.Environment")
    return cls
