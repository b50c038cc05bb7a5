"""One flat set of keys from a YAML file and the command line, checked before torch, TRL or transformers load.

`--config FILE` names the file, as does a first word that is no key; `--key value` overrides a key of it,
`--key.part value` a part of one that holds a mapping. `CommandParser` gives the same spelling to the commands
that have a few options instead of keys.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlkit.arguments.bounds import TRUE, check_values, is_number
from rlkit.arguments.keys import ALGORITHMS
from rlkit.arguments.presets import PRESETS
from rlkit.arguments.schema import INSTALLED, all_keys
from rlkit.errors import UserError, check_choice, nearest
from rlkit.registry import ENVIRONMENTS, load_yaml

SHORT = {"-o": "--output_dir"}
# Spellings that other commands or earlier versions have, where the nearest name is not what was meant.
MEANT = {
    "args": "environment_args",
    "split": "evaluation_split",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "out": "output_dir",
}
LAUNCH_OPTIONS = ("accelerate", "num_processes", "memory", "dry_run", "help", "help_all", "config")


@dataclass
class GivenKeys:
    """The keys that a file, the command line and a caller set.

    Attributes:
        values: YAML's values, and those of the command line as text (lists of texts for keys of lists).
        from_command_line: the keys whose values are text that the parser has yet to convert.
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
    file, words = _split_config(arguments)
    types = all_keys(command)
    whole, parts = _read_words(words)
    for name in [*whole, *(name.split(".")[0] for name, _ in parts)]:
        if name not in types:
            raise _unknown_key(command, name, f"--{name}")
    values = _read_file(command, file) if file is not None else {}
    values |= {key: _one_value(key, texts, types[key]) for key, texts in whole.items()}
    for key in overrides or {}:
        if key not in types:
            raise _unknown_key(command, key, key)
    values |= overrides or {}
    for name, value in parts:
        if name.split(".")[0] in whole:
            raise UserError(f"--{name.split('.')[0]} is given whole and in parts: give one of them")
        set_part(values, name, read_value(value))
    if command == "train":
        algorithm = str(values.get("algorithm", "grpo"))
        values = {**PRESETS[check_choice("algorithm", algorithm, ALGORITHMS)].keys, **values}
    check_values(command, values, types)
    return GivenKeys(values, set(whole) - set(overrides or {}))


def check_start(command: str, arguments: Sequence[str], overrides: Mapping[str, Any] | None = None) -> None:
    """Raise UserError, within a second, for what can be known to be wrong before anything is imported."""
    keys = read_keys(command, arguments, overrides).values
    environment = keys.get("environment")
    if environment is None:
        raise UserError("no environment given: set the key 'environment', e.g. --environment causal-v1")
    if ":" not in str(environment):
        check_choice("environment", str(environment), ENVIRONMENTS)
    if not keys.get("model_name_or_path"):
        example = (
            "sentence-transformers/all-MiniLM-L6-v2" if command == "rank" else "Qwen/Qwen2.5-0.5B-Instruct"
        )
        raise UserError(f"no model given: set the key 'model_name_or_path', e.g. {example}")
    if not keys.get("output_dir"):
        raise UserError("no run directory given: set the key 'output_dir', e.g. -o runs/my-run")
    if all(str(keys.get(key)).lower() in TRUE for key in ("resume", "overwrite")):
        raise UserError("--resume and --overwrite exclude each other")


def _split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the config file, if one is named, and the other words."""
    words = list(arguments)
    files = [words.pop(0)] if words and not words[0].startswith("-") else []
    while "--config" in words:
        at = words.index("--config")
        if at + 1 == len(words) or words[at + 1].startswith("--"):
            raise UserError("--config needs a file")
        files.append(words[at + 1])
        del words[at : at + 2]
    for word in [word for word in words if word.startswith("--config=")]:
        words.remove(word)
        files.append(word.partition("=")[2])
    if len(files) > 1:
        raise UserError(f"a run has one config, not {' and '.join(files)}")
    return (Path(files[0]) if files else None), words


def _read_file(command: str, file: Path) -> dict[str, Any]:
    keys = load_yaml(file)
    for key in keys:
        if key not in all_keys(command):
            raise _unknown_key(command, str(key), str(key), f"{file}: ")
    return {"output_dir": f"runs/{file.stem}"} | keys


def _read_words(words: Sequence[str]) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Return the texts given for each `--key`, and the text of each `--key.part` in order."""
    whole: dict[str, list[str]] = {}
    parts: list[tuple[str, str]] = []
    for name, texts in _by_key(words):
        if "." not in name:
            whole[name] = texts
        elif not texts or not texts[0]:
            raise UserError(f"--{name} needs a value")
        elif len(texts) > 1:
            raise UserError(f"--{name} takes one value, not {' '.join(texts)}: write a list as JSON")
        else:
            parts.append((name, texts[0]))
    return whole, parts


def _by_key(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each key of a command line, without its dashes, with the texts that follow it."""
    keys: list[tuple[str, list[str]]] = []
    for word in words:
        if not word.startswith("-") or is_number(word):
            if not keys:
                raise UserError(f"unexpected {word!r}: a key begins with --, as in --learning_rate 1e-5")
            keys[-1][1].append(word)
            continue
        name, equals, value = SHORT.get(word, word).partition("=")
        if not name.startswith("--"):
            meant = MEANT.get(name.lstrip("-"))
            hint = f" (did you mean '--{meant}'?)" if meant else ": a key begins with --"
            raise UserError(f"unknown option {word!r}{hint}")
        keys.append((name[2:], [value] if equals else []))
    return keys


def _one_value(key: str, texts: list[str], annotation: str) -> Any:
    """Return a key's value: a text, a list of texts for a key that holds one, True for a bare switch."""
    if "list" in annotation:
        if not texts:
            raise UserError(f"--{key} needs a value")
        return texts
    if not texts:
        if "bool" not in annotation:
            raise UserError(f"--{key} needs a value")
        return True
    if len(texts) > 1:
        raise UserError(f"--{key} takes one value, not {' '.join(texts)}: quote it if it is one")
    return texts[0]


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
    hint = nearest_key(key, (*known, *LAUNCH_OPTIONS))
    return UserError(text + (hint or f"; `rlkit {command} --help` lists rlkit's own keys"))


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known key that a misspelt one stands for; "" if none is close."""
    known = set(known)
    plain = key.replace("-", "_")
    meant = MEANT.get(plain)
    if meant in known:
        return f" (did you mean {meant!r}?)"
    hint = nearest(plain, known)
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
    """The value that a word stands for: JSON's, so that 1e-5 is a number, else YAML's, else the word."""
    import yaml

    for read in (json.loads, yaml.safe_load):
        with suppress(ValueError, yaml.YAMLError):
            return read(text)
    return text


class CommandParser(argparse.ArgumentParser):
    """Parser of a command's options: underscores, no abbreviations, complaints of one line.

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
        """Parse the words of a command line; raises UserError for what it does not know."""
        words = list(args)
        parts: list[tuple[str, str]] = []
        if self.mapping is not None:
            words, parts = _take_parts(words, self.mapping)
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name != "--" and name not in self._option_string_actions:
                raise self._unknown(name)
        options, rest = super().parse_known_args(words, namespace)
        if rest:
            raise self._unknown(rest[0])
        if self.mapping is not None:
            setattr(options, self.mapping, _mapping(self.mapping, getattr(options, self.mapping), parts))
        return options

    def known_options(self) -> list[str]:
        """Return the long options, with their dashes."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def _unknown(self, word: str) -> UserError:
        hint = nearest_key(word.lstrip("-"), [name.removeprefix("--") for name in self.known_options()])
        hint = hint.replace("mean '", "mean '--")
        return UserError(f"unknown option {word!r}{hint or f'; see `{self.prog} --help`'}")

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a UserError, without its page of usage."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def _take_parts(words: Sequence[str], mapping: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Take `--mapping.part value` out of a command line."""
    rest: list[str] = []
    parts: list[tuple[str, str]] = []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if not name.startswith(f"--{mapping}."):
            rest.append(word)
            continue
        value = value if equals else next(remaining, "")
        if not value or value.startswith("--"):
            raise UserError(f"{name} needs a value")
        parts.append((name[2:], value))
    return rest, parts


def _mapping(key: str, text: str | None, parts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the mapping that a text in JSON and the parts of a key make together."""
    if text is not None and parts:
        raise UserError(f"--{key} is given whole and in parts: give one of them")
    try:
        value = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"--{key} is not JSON: {error}; write --{key}.level association to set one argument"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"--{key} must be a mapping, not {text}")
    keys = {key: value}
    for name, part in parts:
        set_part(keys, name, read_value(part))
    return keys[key]
