"""One flat set of keys: rlkit's own say what to train on, every other one is TRL's under its own name.

A YAML file and the command line are read by the same parser, the command line last. `--config FILE` names
the file, as does a first word that is no key; `--key value` overrides a key of it, `--key.part value` a part
of one that holds a mapping. A key that nobody knows is an error that names the nearest known one.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import yaml
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig, SFTConfig, TrlParser

from rlkit.arguments.keys import (
    ALGORITHMS,
    MAPPINGS,
    RankArguments,
    SFTArguments,
    TaskArguments,
    TrainArguments,
)
from rlkit.arguments.presets import PRESETS, check_preset
from rlkit.errors import UserError, check_choice, nearest
from rlkit.files import atomic_write
from rlkit.registry import load_yaml

NOT_KEPT = ("resume", "resume_anyway", "overwrite")  # what was meant for one start of a run


Args = TypeVar("Args", bound=TaskArguments)
TrainerArgs = TypeVar("TrainerArgs", bound=TrainingArguments)


@dataclass
class RunConfig(Generic[Args, TrainerArgs]):
    """The parsed configuration of a run.

    Attributes:
        args: rlkit's own keys.
        trainer_args: TRL's and transformers' keys of the trainer.
        model_args: TRL's keys of the model.
        given: the keys that the file and the command line set, with their values.
    """

    args: Args
    trainer_args: TrainerArgs
    model_args: ModelConfig
    given: dict[str, Any]

    def keys(self) -> dict[str, Any]:
        """Every key and its value."""
        return {**vars(self.model_args), **vars(self.trainer_args), **vars(self.args)}

    def resolved(self) -> dict[str, Any]:
        """The keys that make the same run again: those given, and rlkit's own with their defaults."""
        own = {f.name: getattr(self.args, f.name) for f in fields(self.args)}
        own |= {key: self.args.mapping(key) for key in MAPPINGS if key in own}
        keys = {**own, **{key: self.given[key] for key in self.given if key not in own}}
        keys |= {"output_dir": self.trainer_args.output_dir, "seed": self.trainer_args.seed}
        return {key: value for key, value in keys.items() if key not in NOT_KEPT}


class Parser(TrlParser):
    """TrlParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a UserError, without its page of usage."""
        raise UserError(message)


@dataclass
class PolicyConfig(GRPOConfig):
    """TRL's GRPOConfig that also takes a single rollout a prompt, as HRPO has it."""

    if TYPE_CHECKING:  # TRL declares them optional and sets each of them
        num_generations: int = 8
        max_completion_length: int = 256
        generation_batch_size: int = 8
        steps_per_generation: int = 1
        pad_to_multiple_of: int | None = None
        # And these may be JSON until TRL has parsed them.
        model_init_kwargs: dict[str, Any] | None = None
        generation_kwargs: dict[str, Any] | None = None
        gradient_checkpointing_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check and complete the keys."""
        one = self.num_generations == 1
        if one:  # TRL refuses it; any divisor of the batch passes its checks
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            processes = int(os.environ.get("WORLD_SIZE", "1"))  # known to TRL only after its checks
            rows = self.generation_batch_size or self.per_device_train_batch_size * processes * steps
            if rows < 2:
                raise ValueError("one rollout a prompt needs a batch of at least two")
            self.num_generations = rows
        super().__post_init__()
        if one:
            self.num_generations = 1


# What each kind of run is configured by.
TrainConfig = RunConfig[TrainArguments, PolicyConfig]
SFTRunConfig = RunConfig[SFTArguments, SFTConfig]
RankConfig = RunConfig[RankArguments, TrainingArguments]


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """Parse the keys of `rlkit train`, with those that its algorithm sets; raises UserError."""
    run = _parse("train", TrainArguments, PolicyConfig, arguments)
    check_preset(run.args.algorithm, run.keys())
    return run


def parse_sft(arguments: Sequence[str]) -> SFTRunConfig:
    """Parse the keys of `rlkit sft`; raises UserError."""
    return _parse("sft", SFTArguments, SFTConfig, arguments)


def parse_rank(arguments: Sequence[str]) -> RankConfig:
    """Parse the keys of `rlkit rank`; raises UserError."""
    return _parse("rank", RankArguments, TrainingArguments, arguments)


def _parse(kind: str, task: type, trainer: type, arguments: Sequence[str]) -> RunConfig:
    parts: list[Any] = [task, trainer, ModelConfig]
    parser = Parser(parts, prog=f"rlkit {kind}", allow_abbrev=False)
    known = {action.dest for action in parser._actions} - {"help"}
    keys, arguments = _read_config(list(arguments), known)
    keys, arguments = _set_parts(keys, arguments, known)
    output_dir = keys.setdefault("output_dir", keys.pop("__name", None))
    if output_dir is None:
        keys.pop("output_dir")
    options = {word: action.dest for word, action in parser._option_string_actions.items()}
    for word in arguments:  # before the values are looked at, which TRL does first
        if word.startswith("--") and word.split("=")[0] not in options:
            raise UserError(f"unknown key {word!r}{nearest(word.lstrip('-'), known)}")
    if kind == "train":
        keys = _with_preset(keys, arguments)
    words = [word for key, value in keys.items() for word in _words(key, value)]
    try:
        *parsed, rest = parser.parse_args_and_config([*words, *arguments], return_remaining_strings=True)
    except (ValueError, TypeError) as error:  # TRL's and transformers' own checks of the keys
        raise UserError(" ".join(str(error).split())) from error
    if rest:
        raise UserError(f"unknown key {rest[0]!r}{nearest(rest[0].lstrip('-'), known)}")
    for config in parsed:  # `key: null` cannot be said on a command line
        for key, value in keys.items():
            if value is None and hasattr(config, key):
                setattr(config, key, None)
    target = parsed[2].lora_target_modules
    if isinstance(target, str) and target.isidentifier():  # TRL unpacks a list of one name
        parsed[2].lora_target_modules = [target]  # and PEFT takes a text for a pattern of whole paths
    if parsed[1].eval_strategy != "no":
        raise UserError(
            "eval_strategy is TRL's own evaluation: set evaluation_tasks and evaluation_steps instead"
        )
    given = keys | _given([options.get(word.split("=")[0]) for word in arguments], parsed)
    return RunConfig(args=parsed[0], trainer_args=parsed[1], model_args=parsed[2], given=given)


def _with_preset(keys: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The keys of an algorithm below those of the file; the command line, read later, is above both."""
    algorithm = keys.get("algorithm", "grpo")
    for i, word in enumerate(arguments):
        if word.split("=")[0] == "--algorithm":
            algorithm = word.partition("=")[2] or (arguments[i + 1] if i + 1 < len(arguments) else "")
    check_choice("algorithm", algorithm, ALGORITHMS)
    return {**PRESETS[algorithm].keys, **keys}


def _read_config(arguments: list[str], known: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    if "--config" not in arguments:
        return {}, arguments
    at = arguments.index("--config")
    if at + 1 == len(arguments):
        raise UserError("--config needs a file")
    path = Path(arguments[at + 1])
    keys = load_yaml(path)
    for key in keys:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), known)}")
    if "output_dir" not in keys:
        keys["__name"] = f"runs/{path.stem}"
    return keys, arguments[:at] + arguments[at + 2 :]


def _set_parts(
    keys: dict[str, Any], arguments: Sequence[str], known: Iterable[str]
) -> tuple[dict[str, Any], list[str]]:
    """Put `--key.part value` into the mappings of the file; return the keys and the other words."""
    rest: list[str] = []
    parts: list[tuple[str, str]] = []
    words = iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if word.startswith("--") and "." in name:
            parts.append((name[2:], value or next(words, "")))
        else:
            rest.append(word)
    whole = {word.partition("=")[0].removeprefix("--") for word in rest}
    keys = copy.deepcopy(keys)
    for name, value in parts:
        key = name.split(".")[0]
        if key not in known:
            raise UserError(f"unknown key {name!r}{nearest(key, known)}")
        if key in whole:
            raise UserError(f"--{key} is given whole and in parts: give one of them")
        if not value or value.startswith("--"):
            raise UserError(f"--{name} needs a value")
        set_part(keys, name, read_value(value))
    return keys, rest


def set_part(keys: dict[str, Any], name: str, value: object) -> None:
    """Set a key, or `key.part` of one that holds a mapping; raises UserError where it holds none."""
    *path, last = name.split(".")
    for part in path:
        keys[part] = keys[part] if keys.get(part) is not None else {}
        keys = keys[part]
        if not isinstance(keys, dict):
            raise UserError(f"{name}: {part} holds {keys!r}, which has no parts")
    keys[last] = value


def read_value(text: str) -> Any:
    """The value that a word stands for: JSON's, so that 1e-5 is a number, else YAML's, else the word."""
    for read in (json.loads, yaml.safe_load):
        with suppress(ValueError, yaml.YAMLError):
            return read(text)
    return text


def _words(key: str, value: object) -> list[str]:
    """Write a key of a YAML file as a command line would."""
    if value is None or value == []:
        return []
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    values = value if isinstance(value, list) else [value]
    return [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]


def _given(names: Iterable[str | None], parsed: Sequence[Any]) -> dict[str, Any]:
    values = {name: getattr(c, name) for name in names for c in parsed if name and hasattr(c, name)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


PARSERS: dict[str, Callable[[Sequence[str]], RunConfig[Any, Any]]] = {
    "train": parse_train,
    "sft": parse_sft,
    "rank": parse_rank,
}


def save_resolved(run: RunConfig, path: Path) -> None:
    """Write the resolved config, with the versions it ran with as comments."""
    packages = ("rlkit-llm", "trl", "transformers", "torch")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    header = f"# python {sys.version.split()[0]}, {', '.join(versions)}\n"
    atomic_write(path, header + yaml.safe_dump(run.resolved(), sort_keys=False))
