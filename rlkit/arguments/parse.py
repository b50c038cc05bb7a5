"""Parse the config of a run: rlkit's own keys, and those of TRL, transformers and PEFT.

`rlkit.arguments.command_line` reads and checks the keys. This module passes them to TRL's parser, which fills
the dataclasses of each library.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import torch
import yaml
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig, SFTConfig, TrlParser

from rlkit.arguments.bounds import TRUE, is_number
from rlkit.arguments.command_line import read_keys, to_plain
from rlkit.arguments.keys import MAPPINGS, RankArguments, SFTArguments, TaskArguments, TrainArguments
from rlkit.arguments.presets import check_preset
from rlkit.arguments.schema import ARGUMENT_CLASSES, all_keys
from rlkit.errors import UserError, one_line

NOT_SAVED = ("resume", "resume_anyway", "overwrite")  # keys for a single start of a run

Args = TypeVar("Args", bound=TaskArguments)
TrainerArgs = TypeVar("TrainerArgs", bound=TrainingArguments)


@dataclass
class RunConfig(Generic[Args, TrainerArgs]):
    """The parsed configuration of a run.

    Attributes:
        args: rlkit's own keys.
        trainer_args: Keys of TRL's and transformers' trainer config.
        model_args: Keys of TRL's ModelConfig.
        explicit: The keys that the file, the command line or the caller set, with their values.
    """

    args: Args
    trainer_args: TrainerArgs
    model_args: ModelConfig
    explicit: dict[str, Any]

    def keys(self) -> dict[str, Any]:
        """Return all keys with their values, defaults included."""
        return {**vars(self.model_args), **vars(self.trainer_args), **vars(self.args)}

    def resolved(self) -> dict[str, Any]:
        """Return the keys that reproduce the run: those set explicitly, and all of rlkit's own.

        The defaults of TRL and transformers are left out; `resolved_text` records their versions instead.
        """
        keys = {f.name: getattr(self.args, f.name) for f in fields(self.args)}
        keys |= {key: self.args.mapping(key) for key in MAPPINGS if key in keys}
        keys |= {key: value for key, value in self.explicit.items() if key not in keys}
        keys |= {"output_dir": self.trainer_args.output_dir, "seed": self.trainer_args.seed}
        return {key: value for key, value in keys.items() if key not in NOT_SAVED}


class Parser(TrlParser):
    """TrlParser that raises one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as a UserError, without printing the usage."""
        raise UserError(message)


@dataclass
class PolicyConfig(GRPOConfig):
    """TRL's GRPOConfig, except that `num_generations` may be 1, which HRPO needs."""

    if TYPE_CHECKING:  # TRL declares these optional, but its __post_init__ sets each of them
        num_generations: int = 8
        max_completion_length: int = 256
        generation_batch_size: int = 8
        steps_per_generation: int = 1
        pad_to_multiple_of: int | None = None
        # TRL declares these as `dict | str`; the strings are JSON, which its __post_init__ parses.
        model_init_kwargs: dict[str, Any] | None = None
        generation_kwargs: dict[str, Any] | None = None
        gradient_checkpointing_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Let TRL check and complete the keys, with a workaround for `num_generations` 1."""
        is_ungrouped = self.num_generations == 1
        if is_ungrouped:
            # TRL rejects 1 but accepts any divisor of the batch size, such as the batch size itself.
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            num_processes = int(os.environ.get("WORLD_SIZE", "1"))  # TRL reads it only after its checks
            batch_size = (
                self.generation_batch_size or self.per_device_train_batch_size * num_processes * steps
            )
            if batch_size < 2:
                raise ValueError("num_generations 1 needs a generation batch size of at least 2")
            self.num_generations = batch_size
        super().__post_init__()
        if is_ungrouped:
            self.num_generations = 1


# The parsed config of each command.
TrainConfig = RunConfig[TrainArguments, PolicyConfig]
SFTRunConfig = RunConfig[SFTArguments, SFTConfig]
RankConfig = RunConfig[RankArguments, TrainingArguments]

Overrides = Mapping[str, Any]


def parse_train(arguments: Sequence[str], overrides: Overrides | None = None) -> TrainConfig:
    """Parse the keys of `rlkit train` on top of the preset of its algorithm.

    Args:
        arguments: Command line after the command.
        overrides: Keys with Python values; they override the command line.

    Raises:
        UserError: A key is unknown, a value is invalid, or keys contradict each other.
    """
    run = _parse("train", arguments, overrides)
    check_preset(run.args.algorithm, run.keys())
    return run


def parse_sft(arguments: Sequence[str], overrides: Overrides | None = None) -> SFTRunConfig:
    """Parse the keys of `rlkit sft`. Arguments and errors are those of `parse_train`."""
    return _parse("sft", arguments, overrides)


def parse_rank(arguments: Sequence[str], overrides: Overrides | None = None) -> RankConfig:
    """Parse the keys of `rlkit rank`. Arguments and errors are those of `parse_train`."""
    return _parse("rank", arguments, overrides)


PARSERS: dict[str, Callable[[Sequence[str]], RunConfig[Any, Any]]] = {
    "train": parse_train,
    "sft": parse_sft,
    "rank": parse_rank,
}


def trl_parser(command: str) -> Parser:
    """Return TRL's parser of all keys of a command, whose help lists every one."""
    trainer = {"train": PolicyConfig, "sft": SFTConfig, "rank": TrainingArguments}[command]
    dataclass_types: list[Any] = [ARGUMENT_CLASSES[command], trainer, ModelConfig]
    parser = Parser(dataclass_types, prog=f"rlkit {command}", allow_abbrev=False)
    # HfArgumentParser also adds --learning-rate and --no_KEY; the help shows only the spelling we accept.
    for action in parser._actions:
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        if action.option_strings != [f"--{action.dest}"] and action.dest != "help":
            action.help = argparse.SUPPRESS
    return parser


def _parse(command: str, arguments: Sequence[str], overrides: Overrides | None) -> RunConfig:
    config_keys = read_keys(command, arguments, overrides)
    keys = config_keys.values
    types = all_keys(command)
    # For a key of type `str | list[str]`, TRL's parser accepts a single string; lists are set afterwards.
    lists = {
        key: value
        for key, value in keys.items()
        if isinstance(value, list) and len(value) > 1 and "str" in types[key].split(" | ")
    }
    argv: list[str] = []
    for key, value in {**_defaults(keys), **keys}.items():
        argv += _to_argv(key, value[0] if key in lists else value)
    try:
        parsed = trl_parser(command).parse_args_and_config(argv)
    # TRL's and transformers' own checks of the keys.
    except (ValueError, TypeError, ImportError, OSError, AssertionError) as error:
        raise UserError(one_line(error)) from error
    for config in parsed:
        for key in config.__dataclass_fields__:
            if key in lists:
                setattr(config, key, lists[key])
            elif key in keys and keys[key] is None and config.__dataclass_fields__[key].default is not None:
                setattr(config, key, None)  # a command line cannot express `key: null`
    args, trainer_args, model_args = parsed
    if getattr(trainer_args, "activation_offloading", False) and trainer_args.device.type == "cpu":
        raise UserError("activation_offloading moves activations from a GPU to the CPU; remove it on a CPU")
    # TRL turns a list of one module name into a string, and PEFT matches a string as a regular expression
    # against full module paths, where a bare name or the end of a path never matches.
    target = model_args.lora_target_modules
    if isinstance(target, str) and target.replace(".", "").isidentifier():
        model_args.lora_target_modules = [target]
    # The strings from the command line are now converted. Keep the string if YAML cannot represent the value.
    for key in config_keys.from_command_line:
        config = next(config for config in parsed if hasattr(config, key))
        with suppress(UserError):
            keys[key] = to_plain(key, getattr(config, key))
    return RunConfig(args=args, trainer_args=trainer_args, model_args=model_args, explicit=keys)


def _defaults(keys: Overrides) -> dict[str, bool]:
    """Return the defaults that differ from TRL's.

    A NaN loss is logged as NaN, and not as a mean of earlier losses, which is 0 in the first step. On a
    CPU, the precision is float32, and there is no pinned memory.
    """
    on_cpu = str(keys.get("use_cpu")).lower() in TRUE or not torch.accelerator.is_available()
    precision = {"bf16": False, "dataloader_pin_memory": False} if on_cpu else {}
    return {"logging_nan_inf_filter": False} | precision


def _to_argv(key: str, value: object) -> list[str]:
    """Return a key and its value as command-line arguments."""
    if value is None or value == []:
        return []
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{key}", *map(_list_item, value)]
    return [f"--{key}={value}"]


def _list_item(value: object) -> str:
    """Return an item of a list as a command-line argument."""
    if isinstance(value, dict):
        return json.dumps(value)
    text = str(value)
    if text.startswith("-") and is_number(text):
        return f"{Decimal(text):f}"  # argparse mistakes -1e-3 for an option, but not -0.001
    return text


def resolved_text(run: RunConfig) -> str:
    """Return the resolved config as YAML, headed by a comment with the package versions of the run."""
    versions = []
    for package in ("rlkit-llm", "trl", "transformers", "torch"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # rlkit runs from a checkout that is not installed
            versions.append(f"{package} (not installed)")
    header = f"# python {sys.version.split()[0]}, {', '.join(versions)}\n"
    return header + yaml.safe_dump(run.resolved(), sort_keys=False)
