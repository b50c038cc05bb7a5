"""The configuration of a run: rlkit's own keys, and TRL's, transformers' and PEFT's under their own names.

`rlkit.arguments.command_line` reads and checks the keys; here they become the dataclasses of their owners,
by TRL's parser.
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
from rlkit.arguments.command_line import plain, read_keys
from rlkit.arguments.keys import MAPPINGS, RankArguments, SFTArguments, TaskArguments, TrainArguments
from rlkit.arguments.presets import check_preset
from rlkit.arguments.schema import OWN, all_keys
from rlkit.errors import UserError, one_line

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
    """TrlParser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as a UserError, without the usage."""
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


Overrides = Mapping[str, Any]


def parse_train(arguments: Sequence[str], overrides: Overrides | None = None) -> TrainConfig:
    """Parse the keys of `rlkit train`, with those that its algorithm sets; raises UserError."""
    run = _parse("train", arguments, overrides)
    check_preset(run.args.algorithm, run.keys())
    return run


def parse_sft(arguments: Sequence[str], overrides: Overrides | None = None) -> SFTRunConfig:
    """Parse the keys of `rlkit sft`; raises UserError."""
    return _parse("sft", arguments, overrides)


def parse_rank(arguments: Sequence[str], overrides: Overrides | None = None) -> RankConfig:
    """Parse the keys of `rlkit rank`; raises UserError."""
    return _parse("rank", arguments, overrides)


PARSERS: dict[str, Callable[[Sequence[str]], RunConfig[Any, Any]]] = {
    "train": parse_train,
    "sft": parse_sft,
    "rank": parse_rank,
}


def trl_parser(command: str) -> Parser:
    """Return TRL's parser of all keys of a command; its help lists every one."""
    trainer = {"train": PolicyConfig, "sft": SFTConfig, "rank": TrainingArguments}[command]
    parts: list[Any] = [OWN[command], trainer, ModelConfig]
    parser = Parser(parts, prog=f"rlkit {command}", allow_abbrev=False)
    for action in parser._actions:  # the help shows the one spelling that is accepted
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        if action.option_strings != [f"--{action.dest}"] and action.dest != "help":
            action.help = argparse.SUPPRESS  # --no_KEY
    return parser


def _parse(command: str, arguments: Sequence[str], overrides: Overrides | None) -> RunConfig:
    given = read_keys(command, arguments, overrides)
    keys = given.values
    types = all_keys(command)
    # Of `str | list[str]` TRL's parser takes one string; a list is set afterwards.
    lists = {
        key: value
        for key, value in keys.items()
        if isinstance(value, list) and len(value) > 1 and "str" in types[key].split(" | ")
    }
    defaults = _defaults_on_cpu(keys)
    argv = [
        argument
        for key, value in {**defaults, **keys}.items()
        for argument in _arguments(key, value[0] if key in lists else value)
    ]
    try:
        parsed = trl_parser(command).parse_args_and_config(argv)
    except (ValueError, TypeError, ImportError) as error:  # TRL's and transformers' own checks of the keys
        raise UserError(one_line(error)) from error
    for config in parsed:
        for key in config.__dataclass_fields__:
            if key in lists:
                setattr(config, key, lists[key])
            elif key in keys and keys[key] is None and config.__dataclass_fields__[key].default is not None:
                setattr(config, key, None)  # `key: null` cannot be said on a command line
    args, trainer_args, model_args = parsed
    target = model_args.lora_target_modules
    if isinstance(target, str) and target.isidentifier():  # TRL unpacks a list of one name
        model_args.lora_target_modules = [target]  # and PEFT takes a text for a pattern of whole paths
    for key in given.from_command_line:  # converted by the parser, if YAML can represent it
        with suppress(UserError):
            keys[key] = plain(key, next(getattr(config, key) for config in parsed if hasattr(config, key)))
    return RunConfig(args=args, trainer_args=trainer_args, model_args=model_args, given=keys)


def _defaults_on_cpu(keys: Overrides) -> dict[str, bool]:
    """Return the defaults that are not TRL's: without a GPU, train in float32 and pin no memory."""
    on_cpu = str(keys.get("use_cpu")).lower() in TRUE or not torch.accelerator.is_available()
    return {"bf16": False, "dataloader_pin_memory": False} if on_cpu else {}


def _arguments(key: str, value: object) -> list[str]:
    """Write a key and its value as a command line would."""
    if value is None or value == []:
        return []
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{key}", *map(_item, value)]
    return [f"--{key}={value}"]


def _item(value: object) -> str:
    """Write an item of a list as a command line would."""
    if isinstance(value, dict):
        return json.dumps(value)
    text = str(value)
    if text.startswith("-") and is_number(text):
        return f"{Decimal(text):f}"  # argparse takes -1e-3 for an option
    return text


def resolved_text(run: RunConfig) -> str:
    """Return the resolved config as YAML, with the versions it ran with as comments."""
    packages = ("rlkit-llm", "trl", "transformers", "torch")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    header = f"# python {sys.version.split()[0]}, {', '.join(versions)}\n"
    return header + yaml.safe_dump(run.resolved(), sort_keys=False)
