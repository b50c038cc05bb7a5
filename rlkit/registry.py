"""Load environments, rewards and other objects by name, and configs by path.

A name is an id from the tables below, such as "causal-v1", or a reference to an object in a module or a file:
`package.module:Name` or `path/to/file.py:Name`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rlkit.environment import Environment
from rlkit.errors import UserError, check_arguments, nearest, one_line

PACKAGE = Path(__file__).parent

# The environments that come with rlkit, by id.
ENVIRONMENTS = {
    "causal-v1": "rlkit.envs.causal:CausalEnvironment",
    "demonstrate-v1": "rlkit.envs.ranking:DemonstrateEnvironment",
    "identify-v1": "rlkit.envs.ranking:IdentifyEnvironment",
    "intent-v5": "rlkit.envs.ranking:IntentEnvironment",
    "math-v1": "rlkit.envs.math:MathEnvironment",
    "navigate-v4": "rlkit.envs.ranking:NavigateEnvironment",
    "pairs-v1": "rlkit.envs.ranking:PairsEnvironment",
    "query-v4": "rlkit.envs.ranking:QueryEnvironment",
    "rerank-v3": "rlkit.envs.ranking:RerankEnvironment",
    "search-v3": "rlkit.envs.search:SearchEnvironment",
    "simulator-v3": "rlkit.envs.simulator:SimulatorEnvironment",
    "write-v1": "rlkit.envs.ranking:WriteEnvironment",
}

# Attributes that an environment must define in addition to the abstract methods.
REQUIRED_ATTRIBUTES = ("id", "metric", "rewards", "reward_weights")

# Rewards that suit every environment, by their short names.
REWARDS = {
    "arora_zanette": "rlkit.rewards.length_group:arora_zanette",
    "cosine": "rlkit.rewards.length:cosine",
    "dast": "rlkit.rewards.length_group:dast",
    "grpo_lead": "rlkit.rewards.length_group:grpo_lead",
    "hapo": "rlkit.rewards.hapo:HistoryLength",
    "judge": "rlkit.scoring.judge:Judge",
    "kimi": "rlkit.rewards.length_group:kimi",
    "l1_exact": "rlkit.rewards.length:l1_exact",
    "l1_max": "rlkit.rewards.length:l1_max",
    "laser": "rlkit.rewards.length:laser",
    "o1_pruner": "rlkit.rewards.length:o1_pruner",
    "reward_model": "rlkit.scoring.reward_model:RewardModel",
    "soft_overlong": "rlkit.rewards.length:soft_overlong",
    "think_prune": "rlkit.rewards.length:think_prune",
}


# Modules with a user's own objects: what `load_object` loaded, except rlkit and the standard library.
_AUTHORED: set[str] = set()


def load_object(reference: str) -> Any:
    """Import the object that a reference names.

    Exceptions from within the imported module propagate; `author_frames` finds their frames.

    Args:
        reference: `package.module:Name` or `path/to/file.py:Name`.

    Raises:
        UserError: The reference is malformed, the module or file does not exist, or it has no such name.
    """
    source, colon, name = reference.rpartition(":")
    if not colon or not source or not name:
        raise UserError(f"cannot load {reference!r}: write 'package.module:Name' or 'path/file.py:Name'")
    # A user's file may have the name of a standard module, such as random.py.
    if source.endswith(".py") or source.partition(".")[0] not in {"rlkit", *sys.stdlib_module_names}:
        _AUTHORED.add(_file_module(source) if source.endswith(".py") else source)
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
            # Configs written before `rlkit.envs` and `rlkit.rewards` existed lack the prefix.
            path = PACKAGE / Path(*name.split("."))
            exists = path.with_suffix(".py").is_file() or path.is_dir()
            if name.startswith(("envs.", "rewards.")) and exists:
                hint = f"did you mean 'rlkit.{name}'?"
            raise UserError(f"there is no module {name!r}: {hint}") from error
        raise


def _load_file(file: str) -> ModuleType:
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"there is no file {file!r}")
    name = _file_module(file)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # both are set for an existing .py file
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _file_module(file: str) -> str:
    """Return the module name of a file. It is unique, so loading two names from a file runs it once."""
    path = Path(file).expanduser().resolve()
    return "rlkit_file_" + "".join(c if c.isalnum() else "_" for c in str(path.with_suffix("")))


def author_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the traceback frames in a user's own environment or reward code, innermost last.

    They start at the first frame of a module that `load_object` loaded. After that, frames of rlkit,
    installed packages and the standard library are skipped. The list is empty if no user code was involved.
    """
    frames = []
    in_user_code = False
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        authored = any(module == name or module.startswith(f"{name}.") for name in _AUTHORED)
        in_user_code = in_user_code or authored
        if in_user_code and (authored or not _is_library(module, frame.f_code.co_filename)):
            frames.append((frame, line))
    # A file with a syntax error never ran, so it has no frame of its own.
    if not frames and isinstance(error, SyntaxError) and _file_module(error.filename or "") in _AUTHORED:
        return [traceback.FrameSummary(str(error.filename), error.lineno, "<module>")]
    return list(traceback.StackSummary.extract(iter(frames)))


def _is_library(module: str, file: str) -> bool:
    if module.partition(".")[0] == "rlkit":
        return True
    paths = sysconfig.get_paths()
    return file.startswith(("<", paths["stdlib"], paths["purelib"], paths["platlib"]))


def find_config(path: str | Path) -> Path:
    """Return the path of a config.

    A path `configs/...` that does not exist in the working directory is looked up in the configs that ship
    with rlkit.
    """
    path = Path(path)
    if not path.exists() and path.parts[:1] == ("configs",) and (PACKAGE / path).is_file():
        return PACKAGE / path
    return path


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that contains a mapping.

    Raises:
        UserError: The file cannot be read, is not valid YAML, repeats a key, or contains no mapping.
    """
    import yaml  # not at the top: loading an environment does not need it

    path = find_config(path)
    try:
        keys = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = nearest_config(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read {path}: {error.strerror}{hint}") from error
    # PyYAML raises a ValueError for a date such as 2024-13-01 and for a number with thousands of digits.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(keys, dict):
        raise UserError(f"{path} must contain a mapping of keys to values, not {keys!r:.60}")
    return keys


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        UserError: A mapping repeats a key.
        yaml.YAMLError, ValueError, RecursionError: The text is not valid YAML.
    """
    import yaml

    return yaml.load(text, Loader=_unique_key_loader())


def nearest_config(path: Path) -> str:
    """Return ` (did you mean 'x'?)` for the existing config most similar to a missing one, else ""."""
    if path.parts[:1] == ("configs",):
        available = [file.relative_to(PACKAGE) for file in (PACKAGE / "configs").glob("*/*.yaml")]
    else:
        available = list(path.parent.glob("*.yaml"))
    hint = nearest(str(path), map(str, available))
    return hint if "did you mean" in hint else ""


@cache
def _unique_key_loader() -> Any:
    """Return a safe loader that rejects repeated keys; PyYAML itself silently keeps the last value."""
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            # At this point merges (`<<: *base`) are not expanded yet, so overriding a merged key is allowed.
            node = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in lines:
                        first = lines[key.tag, key.value]
                        raise UserError(f"the key {key.value!r} is set twice, on lines {first} and {line}")
                    lines[key.tag, key.value] = line
            return node

    return UniqueKeyLoader


def load_environment(name: str, **kwargs: Any) -> Environment:
    """Build an environment.

    Args:
        name: Id of the environment, `package.module:Class` or `path/file.py:Class`.
        kwargs: Arguments of its constructor.

    Raises:
        UserError: There is no such environment, it lacks a required method or attribute, or its constructor
            does not accept one of the arguments.
    """
    cls = environment_class(name)
    check_arguments(cls, kwargs)
    if cls.__abstractmethods__:
        raise UserError(f"environment {name} does not define {', '.join(sorted(cls.__abstractmethods__))}")
    environment = cls(**kwargs)
    if missing := [attribute for attribute in REQUIRED_ATTRIBUTES if not hasattr(environment, attribute)]:
        raise UserError(f"environment {name} does not define {', '.join(missing)}")
    for attribute in ("rewards", "reward_weights"):
        value = getattr(environment, attribute)
        if not isinstance(value, Mapping):
            raise UserError(f"environment {name}: {attribute} must be a mapping by name, not {value!r:.60}")
    return environment


def environment_class(name: str) -> type[Environment]:
    """Return the class of an environment.

    Args:
        name: Name, as in `load_environment`.

    Raises:
        UserError: There is no such environment, or the object is not an environment class.
    """
    if ":" not in name and name not in ENVIRONMENTS:
        raise UserError(f"there is no environment {name!r}{nearest(name, ENVIRONMENTS)}")
    cls = load_object(ENVIRONMENTS.get(name, name))
    if not (isinstance(cls, type) and issubclass(cls, Environment)):
        raise UserError(f"{name} is not a subclass of rlkit.environment.Environment")
    return cls
