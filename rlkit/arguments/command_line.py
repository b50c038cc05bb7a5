"""One flat set of keys from a YAML file and the command line, checked before torch, TRL or transformers load.

`--config FILE` names the file, as does a leading argument without dashes; `--key value` overrides a key of
it, `--key.part value` a part of one that holds a mapping. `CommandParser` gives the same spelling to the
commands that have a few options instead of keys.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from rlkit.arguments.bounds import check_values, is_number
from rlkit.arguments.keys import ALGORITHMS
from rlkit.arguments.presets import PRESETS
from rlkit.arguments.schema import INSTALLED, all_keys
from rlkit.errors import UserError, check_choice, nearest
from rlkit.registry import ENVIRONMENTS, load_yaml

SHORT = {"-o": "--output_dir"}
# Spellings of other commands or earlier versions, where the nearest name is not what was meant.
MEANT = {
    "args": "environment_args",
    "n": "evaluation_tasks",
    "split": "evaluation_split",
    "evaluation_split": "split",
    "evaluation_tasks": "num_tasks",
    "num_tasks": "evaluation_tasks",
    "output_dir": "out",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "out": "output_dir",
}
PYTHON_CONSTANTS = {"True": True, "False": False, "None": None}
LAUNCH_OPTIONS = ("accelerate", "num_processes", "memory", "dry_run", "help", "help_all", "config")


@dataclass
class GivenKeys:
    """The keys that a file, the command line and a caller set.

    Attributes:
        values: values of YAML and Python, and the strings of the command line (a list for a key of lists).
        from_command_line: the keys whose strings the parser has yet to convert.
    """

    values: dict[str, Any]
    from_command_line: set[str]


def read_keys(
    command: str, arguments: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> GivenKeys:
    """Read and check the keys of a run; an algorithm's keys are below those of the file.

    Args:
        command: train, sft or rank.
        arguments: the command line after the command.
        overrides: keys with Python values, above those of the command line.

    Raises:
        UserError: a key that does not exist, or a value that its key cannot have.
    """
    file, argv = _split_config(arguments)
    types = all_keys(command)
    whole, parts = _read_argv(argv)
    for name in [*whole, *(name.split(".")[0] for name, _ in parts)]:
        if name not in types:
            raise _unknown_key(command, name, f"--{name}")
    values = _read_file(command, file) if file is not None else {}
    values |= {key: _one_value(key, strings, types[key]) for key, strings in whole.items()}
    for key in overrides or {}:
        if key not in types:
            raise _unknown_key(command, key, key)
    values |= overrides or {}
    values = {key: plain(key, value) for key, value in values.items()}
    for name, value in parts:
        if name.split(".")[0] in whole:
            raise UserError(f"set --{name.split('.')[0]} or --{name}, not both")
        set_part(values, name, read_value(value))
    if command == "train":
        algorithm = str(values.get("algorithm", "grpo"))
        values = {**PRESETS[check_choice("algorithm", algorithm, ALGORITHMS)].keys, **values}
        scaling = {"true": "group", "false": "none"}.get(str(values["scale_rewards"]).lower())
        values["scale_rewards"] = scaling or values["scale_rewards"]  # TRL takes a switch as well
    check_values(command, values, types)
    from_command_line = {key for key in whole if key not in (overrides or {}) and values[key] is not None}
    return GivenKeys(values, from_command_line)


def check_keys(
    command: str, arguments: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the keys of a run that has all it needs; raises UserError for what is missing or wrong."""
    keys = read_keys(command, arguments, overrides).values
    environment = keys.get("environment")
    if environment is None:
        raise UserError("no environment given: set the key 'environment', e.g. --environment causal-v1")
    if ":" not in str(environment):
        check_choice("environment", str(environment), ENVIRONMENTS)
    rewards = keys.get("rewards") or []
    for reference in [environment, *(rewards if isinstance(rewards, list) else [rewards])]:
        file, _, _ = str(reference).rpartition(":")
        if file.endswith(".py") and not Path(file).expanduser().is_file():
            raise UserError(f"there is no file {file!r}")
    if not keys.get("model_name_or_path"):
        encoder = "sentence-transformers/all-MiniLM-L6-v2"
        example = encoder if command == "rank" else "bundled:smollm2-135m"
        raise UserError(f"no model given: set the key 'model_name_or_path', e.g. {example}")
    if not keys.get("output_dir"):
        raise UserError("no run directory given: set the key 'output_dir', e.g. -o runs/my-run")
    return keys


def _split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the config file, if one is named, and the other arguments."""
    argv = list(arguments)
    files = [argv.pop(0)] if argv and not argv[0].startswith("-") else []
    while "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv) or argv[at + 1].startswith("--"):
            raise UserError("--config needs a file")
        files.append(argv[at + 1])
        del argv[at : at + 2]
    for argument in [argument for argument in argv if argument.startswith("--config=")]:
        argv.remove(argument)
        files.append(argument.partition("=")[2])
    if len(files) > 1:
        raise UserError(f"a run has one config, not {' and '.join(files)}")
    return (Path(files[0]) if files else None), argv


def _read_file(command: str, file: Path) -> dict[str, Any]:
    keys = load_yaml(file)
    for key in keys:
        if key not in all_keys(command):
            raise _unknown_key(command, str(key), str(key), f"{file}: ")
    return {"output_dir": f"runs/{file.stem}"} | keys


def plain(key: str, value: object) -> Any:
    """Return a value as YAML and JSON can hold it; raises UserError for an object of another kind."""
    if isinstance(value, Enum):
        return plain(key, value.value)
    if hasattr(value, "item"):  # a number of NumPy
        return plain(key, value.item())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(part): plain(f"{key}.{part}", item) for part, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(key, item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.date):  # YAML reads 2024-01-01 as one
        return value.isoformat()
    raise UserError(f"{key} must be a number, a string, a list or a mapping, not {type(value).__name__}")


def _read_argv(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Return the strings given for each `--key`, and the string of each `--key.part` in order."""
    whole: dict[str, list[str]] = {}
    parts: list[tuple[str, str]] = []
    for name, strings in _by_key(argv):
        if "." not in name:
            whole[name] = strings
        elif not strings or not strings[0]:
            raise UserError(f"--{name} needs a value")
        elif len(strings) > 1:
            raise UserError(f"--{name} takes one value, not {' '.join(strings)}: write a list as JSON")
        else:
            parts.append((name, strings[0]))
    return whole, parts


def _by_key(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each key of a command line, without its dashes, with the strings that follow it."""
    keys: list[tuple[str, list[str]]] = []
    for argument in argv:
        if not argument.startswith("-") or is_number(argument):
            if not keys:
                raise UserError(f"unexpected {argument!r}: a key begins with --, as in --learning_rate 1e-5")
            keys[-1][1].append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = SHORT.get(name, name)
        if not name.startswith("--"):
            meant = MEANT.get(name.lstrip("-"))
            hint = f" (did you mean '--{meant}'?)" if meant else ": a key begins with --"
            raise UserError(f"unknown option {argument!r}{hint}")
        keys.append((name[2:], [value] if equals else []))
    return keys


def _one_value(key: str, strings: list[str], annotation: str) -> Any:
    """Return a key's value: a string, a list of strings for a key that holds one, True for a bare switch."""
    if "list" in annotation:
        if not strings:
            raise UserError(f"--{key} needs a value")
        return strings[0] if len(strings) == 1 and "str" in annotation.split(" | ") else strings
    if not strings:
        if "bool" not in annotation:
            raise UserError(f"--{key} needs a value")
        return True
    if strings == ["null"] and "None" in annotation.split(" | "):
        return None
    if len(strings) > 1:
        raise UserError(f"--{key} takes one value, not {' '.join(strings)}: quote a value with spaces")
    return strings[0]


def _unknown_key(command: str, key: str, shown: str, prefix: str = "") -> UserError:
    """Return the error for a key that a command does not have, with the key that was probably meant."""
    known = all_keys(command)
    text = f"{prefix}unknown key {shown!r}"
    negated = key.replace("-", "_").removeprefix("no_")
    others = [other for other in INSTALLED if key in all_keys(other)]
    if negated != key.replace("-", "_") and negated in known:
        return UserError(f"{text}: write --{negated} false")
    if others:
        return UserError(f"{text}: it is a key of `rlkit {others[0]}`, not of `rlkit {command}`")
    options = LAUNCH_OPTIONS if shown.startswith("--") else ()
    if key in LAUNCH_OPTIONS and not options:
        return UserError(f"{text}: it is an option of the command line, not a key")
    hint = nearest_key(key, (*known, *options))
    return UserError(text + (hint or f"; `rlkit {command} --help` lists rlkit's own keys"))


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known key that a misspelt one stands for; "" if none is close."""
    known = set(known)
    underscored = key.replace("-", "_")
    meant = MEANT.get(underscored)
    if meant in known:
        return f" (did you mean {meant!r}?)"
    hint = nearest(underscored, known)
    return hint if "did you mean" in hint else ""


def set_part(keys: dict[str, Any], name: str, value: object) -> None:
    """Set a key, or `key.part` of one that holds a mapping; raises UserError where it holds none."""
    first, *path = name.split(".")
    if not path:
        keys[first] = value
        return
    keys[first] = copy.deepcopy(keys.get(first))  # the mapping may be the caller's
    *path, last = [first, *path]
    for part in path:
        keys[part] = keys[part] if keys.get(part) is not None else {}
        keys = keys[part]
        if not isinstance(keys, dict):
            raise UserError(f"{name}: {part} holds {keys!r}, which has no parts")
    keys[last] = value


def read_value(text: str) -> Any:
    """Return the value that a string of the command line stands for: JSON's or Python's, else the string.

    `1e-5`, `true`, `True`, `null`, `[1, 2]` and `[a, b]` are values; `no` and `2024-01-01` are strings.
    """
    if text in PYTHON_CONSTANTS:
        return PYTHON_CONSTANTS[text]
    with suppress(ValueError):
        return json.loads(text)
    if text.startswith(("[", "{")):
        import yaml

        with suppress(yaml.YAMLError):
            return yaml.safe_load(text)
    return text


def output_file(text: str) -> Path:
    """Return the path of an output file (an argparse `type`); an error if it cannot be written."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {parent} is no writable folder")
    return path


class CommandParser(argparse.ArgumentParser):
    """Parser of a command's options: underscores, no abbreviations, one-line errors.

    `--environment_args '{"level": 2}'` and `--environment_args.level 2` fill `options.environment_args`, a
    dict, where the command has that option (`add_environment_args`).
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.mapping: str | None = None

    def add_environment_args(self, text: str = "arguments of the environment") -> None:
        """Add `--environment_args`, whose parts can be set one by one."""
        self.mapping = "environment_args"
        self.add_argument(
            "--environment_args", metavar="JSON", help=f"{text}; --environment_args.KEY VALUE sets one"
        )

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse a command line; raises UserError for what the command does not have."""
        argv = list(args)
        parts: list[tuple[str, str]] = []
        if self.mapping is not None:
            argv, parts = _take_parts(argv, self.mapping)
        for argument in argv:
            name = argument.partition("=")[0]
            if name.startswith("--") and name != "--" and name not in self._option_string_actions:
                raise self._unknown(name)
        options, unknown = super().parse_known_args(argv, namespace)
        if unknown:
            raise self._unknown(unknown[0])
        if self.mapping is not None:
            setattr(options, self.mapping, _mapping(self.mapping, getattr(options, self.mapping), parts))
        return options

    def known_options(self) -> list[str]:
        """Return the long options, with their dashes."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def _unknown(self, argument: str) -> UserError:
        hint = nearest_key(argument.lstrip("-"), [name.removeprefix("--") for name in self.known_options()])
        hint = hint.replace("mean '", "mean '--")
        return UserError(f"unknown option {argument!r}{hint or f'; see `{self.prog} --help`'}")

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as a UserError, without the usage."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def _take_parts(argv: Sequence[str], mapping: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Take `--mapping.part value` out of a command line."""
    others: list[str] = []
    parts: list[tuple[str, str]] = []
    remaining = iter(argv)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if not name.startswith(f"--{mapping}."):
            others.append(argument)
            continue
        value = value if equals else next(remaining, "")
        if not value or value.startswith("--"):
            raise UserError(f"{name} needs a value")
        parts.append((name[2:], value))
    return others, parts


def _mapping(key: str, text: str | None, parts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the mapping that a string of JSON and the parts of a key make together."""
    if text is not None and parts:
        raise UserError(f"set --{key} or --{parts[0][0]}, not both")
    try:
        value = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--{key} is not JSON: {error}; --{key}.KEY VALUE sets one argument") from error
    if not isinstance(value, dict):
        raise UserError(f"--{key} must be a mapping, not {text}")
    keys = {key: value}
    for name, part in parts:
        set_part(keys, name, read_value(part))
    return keys[key]
