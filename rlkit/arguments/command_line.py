"""Read config keys from a YAML file and the command line, and check them before torch or TRL is imported.

All keys form one flat namespace. `--config FILE` names the YAML file, as does a leading argument without
dashes. `--key value` overrides a key of the file, and `--key.part value` sets one entry of a mapping.
`CommandParser` parses the commands that have a few options instead of keys, with the same spelling.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from rlkit.arguments.bounds import check_values, holds_mapping, is_number
from rlkit.arguments.keys import ALGORITHMS
from rlkit.arguments.presets import PRESETS
from rlkit.arguments.references import check_references
from rlkit.arguments.schema import INSTALLED, all_keys
from rlkit.errors import UserError, check_choice, nearest
from rlkit.registry import ENVIRONMENTS, environment_class, load_yaml, parse_yaml

SHORT = {"-o": "--output_dir"}
# Spellings of other commands and earlier versions, for which the most similar name is the wrong suggestion.
ALIASES = {
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
# Options that are not keys; they are listed here only to be suggested for a misspelled key.
LAUNCH_OPTIONS = ("accelerate", "num_processes", "memory", "dry_run", "help", "help_all", "config")


@dataclass
class ConfigKeys:
    """The keys that a config file, the command line or a caller set.

    Attributes:
        values: Values from YAML and Python, and strings from the command line; for a key with a list type, a
            list of strings.
        from_command_line: Keys whose values are still strings and must be converted by the parser.
    """

    values: dict[str, Any]
    from_command_line: set[str]


def read_keys(
    command: str, arguments: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> ConfigKeys:
    """Read and check the keys of a run.

    Precedence, lowest first: the algorithm's preset, the file, the command line, `overrides`, and parts of
    mappings on the command line (`--key.part value`).

    Args:
        command: "train", "sft" or "rank".
        arguments: Command line after the command.
        overrides: Keys with Python values.

    Raises:
        UserError: A key does not exist or has an invalid value.
    """
    overrides = overrides or {}
    file, argv = _split_config(arguments)
    types = all_keys(command)
    options, parts = _read_argv(argv)
    values = _read_file(command, file) if file is not None else {}
    strings = options.get("environment")
    environment = overrides.get("environment") or (strings[0] if strings else values.get("environment"))
    for name in [*options, *(name.split(".")[0] for name, _ in parts)]:
        if name not in types:
            raise _unknown_key(command, name, f"--{name}", environment=environment)
    values |= {key: _value_of_strings(key, strings, types[key]) for key, strings in options.items()}
    for key in overrides:
        if key not in types:
            raise _unknown_key(command, key, key, environment=environment)
    values |= overrides
    values = {key: _parse_if_mapping(key, value, types[key]) for key, value in values.items()}
    values = _all_plain(values)
    for name, value in parts:
        if name.split(".")[0] in options:
            raise UserError(f"set --{name.split('.')[0]} or --{name}, not both")
        set_part(values, name, parse_value(value))
    if command == "train":
        algorithm = str(values.get("algorithm", "grpo"))
        values = {**PRESETS[check_choice("algorithm", algorithm, ALGORITHMS)].keys, **values}
        # TRL still accepts a bool for scale_rewards.
        scaling = {"true": "group", "false": "none"}.get(str(values["scale_rewards"]).lower())
        values["scale_rewards"] = scaling or values["scale_rewards"]
    check_values(command, values, types)
    is_string = {key: isinstance(values[key], str | list | bool) for key in options if key not in overrides}
    return ConfigKeys(values, {key for key in options if is_string.get(key)})


def check_keys(
    command: str, arguments: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read the keys of a run and check that the required ones are set and that what they name exists.

    Arguments are those of `read_keys`.

    Returns:
        The values by key.

    Raises:
        UserError: A key is missing or unknown, a value is invalid, or a file does not exist.
    """
    keys = read_keys(command, arguments, overrides).values
    if keys.get("environment") is None:
        raise UserError("no environment given: set the key 'environment', e.g. --environment causal-v1")
    check_references(command, keys)
    if not keys.get("model_name_or_path"):
        encoder = "sentence-transformers/all-MiniLM-L6-v2"
        example = encoder if command == "rank" else "bundled:smollm2-135m"
        raise UserError(f"no model given: set the key 'model_name_or_path', e.g. {example}")
    if not keys.get("output_dir"):
        raise UserError("no run directory given: set the key 'output_dir', e.g. -o runs/my-run")
    return keys


def _split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split a command line into the config file, if any, and the remaining arguments."""
    argv = list(arguments)
    files = []
    if argv and not argv[0].startswith("-"):
        files.append(argv.pop(0))
    while "--config" in argv:
        index = argv.index("--config")
        if index + 1 == len(argv) or argv[index + 1].startswith("--"):
            raise UserError("--config needs a file")
        files.append(argv[index + 1])
        del argv[index : index + 2]
    for argument in [argument for argument in argv if argument.startswith("--config=")]:
        argv.remove(argument)
        files.append(argument.partition("=")[2])
    if len(files) > 1:
        raise UserError(f"only one config file is allowed, not {' and '.join(files)}")
    return (Path(files[0]) if files else None), argv


def _read_file(command: str, file: Path) -> dict[str, Any]:
    keys = load_yaml(file)
    for key in keys:
        if key not in all_keys(command):
            raise _unknown_key(command, str(key), str(key), f"{file}: ", keys.get("environment"))
    # Each config gets its own run directory by default.
    return {"output_dir": f"runs/{file.stem}"} | keys


def to_plain(key: str, value: object) -> Any:
    """Convert a value to types that YAML and JSON can represent.

    Raises:
        UserError: The value has another type, such as a model.
    """
    if isinstance(value, Enum):
        return to_plain(key, value.value)
    if hasattr(value, "item"):  # NumPy scalar
        return to_plain(key, value.item())
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{key} must not contain a NUL character, but is {value!r:.60}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(part): to_plain(f"{key}.{part}", item) for part, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(key, item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.date):  # PyYAML parses an unquoted 2024-01-01 as a date
        return value.isoformat()
    raise UserError(f"{key} must be a number, a string, a list or a mapping, not {type(value).__name__}")


def _all_plain(values: Mapping[str, object]) -> dict[str, Any]:
    plain = {}
    for key, value in values.items():
        try:
            plain[key] = to_plain(key, value)
        except RecursionError:  # YAML's `&a {b: *a}` contains itself
            raise UserError(f"{key} contains itself or is nested too deeply") from None
    return plain


def _read_argv(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Return the strings that follow each `--key`, and the string of each `--key.part` in order."""
    options: dict[str, list[str]] = {}
    parts: list[tuple[str, str]] = []
    for name, strings in _group_by_key(argv):
        if "." not in name:
            options[name] = strings
        elif not strings or not strings[0]:
            raise UserError(f"--{name} needs a value")
        elif len(strings) > 1:
            raise UserError(f"--{name} takes one value, not {' '.join(strings)}; write a list as JSON")
        else:
            parts.append((name, strings[0]))
    return options, parts


def _group_by_key(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each key of a command line, without its dashes, with the strings that follow it."""
    keys: list[tuple[str, list[str]]] = []
    for argument in argv:
        # A negative number such as -1e-3 is a value, not an option.
        if not argument.startswith("-") or is_number(argument):
            if not keys:
                raise UserError(
                    f"unexpected argument {argument!r}: keys start with --, as in --learning_rate 1e-5"
                )
            keys[-1][1].append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = SHORT.get(name, name)
        if not name.startswith("--"):
            alias = ALIASES.get(name.lstrip("-"))
            hint = f" (did you mean '--{alias}'?)" if alias else ": keys start with --"
            raise UserError(f"unknown option {argument!r}{hint}")
        keys.append((name[2:], [value] if equals else []))
    return keys


def _value_of_strings(key: str, strings: list[str], annotation: str) -> Any:
    """Return the value of a key: a string, a list of strings if its type is a list, True for a bare flag."""
    if "list" in annotation:
        if not strings:
            raise UserError(f"--{key} needs a value")
        return strings[0] if len(strings) == 1 and "str" in annotation.split(" | ") else strings
    if not strings:
        if "bool" not in annotation:
            raise UserError(f"--{key} needs a value")
        return True
    # Only for optional keys: elsewhere "null" is an invalid value, or a valid string.
    if strings == ["null"] and "None" in annotation.split(" | "):
        return None
    if len(strings) > 1:
        raise UserError(f"--{key} takes one value, not {' '.join(strings)}; quote a value that has spaces")
    return strings[0]


def _unknown_key(
    command: str, key: str, shown: str, prefix: str = "", environment: object = None
) -> UserError:
    """Return the error for a key that a command does not have.

    Args:
        command: "train", "sft" or "rank".
        key: Name of the key, without dashes.
        shown: The key as the user wrote it; with dashes if it is from the command line.
        prefix: Start of the message, such as the name of the config file.
        environment: Environment of the run, if any. The key may be one of its arguments.
    """
    available = all_keys(command)
    message = f"{prefix}unknown key {shown!r}"
    underscored = key.replace("-", "_")
    negated = underscored.removeprefix("no_")
    if negated != underscored and negated in available:
        return UserError(f"{message}: write --{negated} false")
    for other_command in INSTALLED:
        if key in all_keys(other_command):
            return UserError(f"{message}: it is a key of `rlkit {other_command}`, not of `rlkit {command}`")
    if str(environment) in ENVIRONMENTS:
        arguments = inspect.signature(environment_class(str(environment))).parameters
        if key in arguments and shown.startswith("--"):
            return UserError(f"{message}: it is an argument of {environment}; set --environment_args.{key}")
        if key in arguments:
            return UserError(f"{message}: it is an argument of {environment}; set it in environment_args")
    options = LAUNCH_OPTIONS if shown.startswith("--") else ()
    if key in LAUNCH_OPTIONS and not options:
        return UserError(f"{message}: it is a command-line option, not a config key")
    hint = nearest_key(key, (*available, *options))
    return UserError(message + (hint or f"; see `rlkit {command} --help` for rlkit's own keys"))


def nearest_key(key: str, available: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the key that a misspelled one most likely means, else ""."""
    available = set(available)
    underscored = key.replace("-", "_")
    alias = ALIASES.get(underscored)
    if alias in available:
        return f" (did you mean {alias!r}?)"
    hint = nearest(underscored, available)
    return hint if "did you mean" in hint else ""


def set_part(keys: dict[str, Any], name: str, value: object) -> None:
    """Set `key` or, if the name has dots, an entry `key.part` of a mapping.

    Args:
        keys: Keys to change in place. A mapping in it is copied, because it may belong to the caller.
        name: Name of the key, or names joined with dots.
        value: Value to set.

    Raises:
        UserError: A name before a dot does not hold a mapping.
    """
    first, *path = name.split(".")
    if not path:
        keys[first] = value
        return
    keys[first] = copy.deepcopy(keys.get(first))
    *path, last = [first, *path]
    for part in path:
        if keys.get(part) is None:
            keys[part] = {}
        keys = keys[part]
        if not isinstance(keys, dict):
            raise UserError(f"cannot set {name}: {part} is {keys!r}, not a mapping")
    keys[last] = value


def parse_value(text: str) -> Any:
    """Parse a string from the command line as JSON, Python constant or YAML; else return the string.

    `1e-5`, `true`, `True`, `null`, `[1, 2]`, `[a, b]` and `{a: b}` are parsed; `no` and `2024-01-01` stay
    strings.

    Raises:
        UserError: A mapping has a key twice.
    """
    if text in PYTHON_CONSTANTS:
        return PYTHON_CONSTANTS[text]
    with suppress(ValueError, RecursionError):
        return json.loads(text, object_pairs_hook=_unique_keys)
    if text.startswith(("[", "{")):
        import yaml

        with suppress(yaml.YAMLError, ValueError, RecursionError):
            return parse_yaml(text)
    return text


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the entries of a JSON object as a dict; raise UserError if a key is repeated."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"the key {repeated!r} is set twice")
    return entries


def _parse_if_mapping(key: str, value: object, annotation: str) -> object:
    """Return the mapping in the string of a key that holds one, such as `{length: stop}`; else the value."""
    if not isinstance(value, str) or not value.lstrip().startswith("{") or not holds_mapping(key, annotation):
        return value
    try:
        parsed = parse_value(value.strip())
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return parsed if isinstance(parsed, dict) else value


def folder_path(name: str) -> Path:
    """Return the path of a folder, which may begin with "~". An argparse `type`."""
    return Path(name).expanduser()


def output_file(name: str) -> Path:
    """Return the path of an output file. An argparse `type`: it fails if the file cannot be written."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder; name a file")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {name}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {name}: the folder {parent} is not writable")
    return path


class CommandParser(argparse.ArgumentParser):
    """Argument parser with underscores in option names, no abbreviations and one-line errors.

    After `add_mapping("environment_args", …)`, both `--environment_args '{"level": 2}'` and
    `--environment_args.level 2` set the dict `options.environment_args`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.mappings: list[str] = []  # names of the options that hold a mapping

    def add_environment_args(self, description: str = "arguments of the environment as JSON") -> None:
        """Add `--environment_args`, whose entries can also be set one by one."""
        self.add_mapping("environment_args", description, part="KEY")

    def add_mapping(self, name: str, description: str, part: str) -> None:
        """Add an option that holds a mapping, whose entries can also be set one by one.

        Args:
            name: Name of the option.
            description: Description of the mapping for `--help`.
            part: Name of an entry for `--help`, such as "KEY".
        """
        self.mappings.append(name)
        text = f"{description}; or set each one with --{name}.{part} VALUE"
        self.add_argument(f"--{name}", metavar="JSON", help=text)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse a command line; raises UserError for an unknown option or an invalid value."""
        argv = list(args)
        parts: dict[str, list[tuple[str, str]]] = {}
        for name in self.mappings:
            argv, parts[name] = _extract_parts(argv, name)
        # Before argparse: its own error for a misspelled option would suggest nothing.
        for argument in argv:
            name = argument.partition("=")[0]
            if name.startswith("--") and name != "--" and name not in self._option_string_actions:
                raise self._unknown(name)
        options, unknown = super().parse_known_args(argv, namespace)
        if unknown:
            raise self._unknown(unknown[0])
        for name in self.mappings:
            setattr(options, name, _parse_mapping(name, getattr(options, name), parts[name]))
        return options

    def long_options(self) -> list[str]:
        """Return the names of the long options, with their dashes."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def _unknown(self, argument: str) -> UserError:
        hint = nearest_key(argument.lstrip("-"), [name.removeprefix("--") for name in self.long_options()])
        hint = hint.replace("mean '", "mean '--")
        return UserError(f"unknown option {argument!r}{hint or f'; see `{self.prog} --help`'}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise a UserError with the nearest choice if an option has choices without this value."""
        if action.choices is not None:
            check_choice("/".join(action.option_strings) or action.dest, value, action.choices)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as a UserError, without printing the usage."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def _extract_parts(argv: Sequence[str], mapping: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Split a command line into the arguments without `--mapping.part value`, and these parts."""
    remaining: list[str] = []
    parts: list[tuple[str, str]] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not name.startswith(f"--{mapping}."):
            remaining.append(argument)
            continue
        value = value if equals else next(arguments, "")
        if not value or value.startswith("--"):
            raise UserError(f"{name} needs a value")
        parts.append((name[2:], value))
    return remaining, parts


def _parse_mapping(key: str, text: str | None, parts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the mapping of `--key JSON` or of the parts `--key.part value`."""
    if text is not None and parts:
        raise UserError(f"set --{key} or --{parts[0][0]}, not both")
    value = {} if text is None else parse_value(text.strip())
    if not isinstance(value, dict):
        raise UserError(
            f"--{key} must be a mapping such as '{{a: 1}}', not {text!r:.60}; or use --{key}.KEY VALUE"
        )
    keys = {key: value}
    for name, part in parts:
        set_part(keys, name, parse_value(part))
    return keys[key]
