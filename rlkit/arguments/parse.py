"""The configuration of a run: rlkit's own keys, and TRL's, transformers' and PEFT's under their own names.

`rlkit.arguments.command_line` reads and checks the keys; here they become the dataclasses of their owners,
by TRL's parser.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import torch
import yaml
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig, SFTConfig, TrlParser

from rlkit.arguments.bounds import TRUE
from rlkit.arguments.command_line import read_keys
from rlkit.arguments.keys import MAPPINGS, RankArguments, SFTArguments, TaskArguments, TrainArguments
from rlkit.arguments.presets import check_preset
from rlkit.arguments.schema import OWN
from rlkit.errors import UserError, one_line
from rlkit.files import atomic_write

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
    return Parser(parts, prog=f"rlkit {command}", allow_abbrev=False)


def _parse(command: str, arguments: Sequence[str], overrides: Overrides | None) -> RunConfig:
    given = read_keys(command, arguments, overrides)
    keys = given.values
    words = [word for key, value in {**_precision(keys), **keys}.items() for word in _words(key, value)]
    try:
        parsed = trl_parser(command).parse_args_and_config(words)
    except (ValueError, TypeError, ImportError) as error:  # TRL's and transformers' own checks of the keys
        raise UserError(one_line(error)) from error
    for config in parsed:  # `key: null` cannot be said on a command line
        for key, value in keys.items():
            if value is None and hasattr(config, key):
                setattr(config, key, None)
    args, trainer_args, model_args = parsed
    target = model_args.lora_target_modules
    if isinstance(target, str) and target.isidentifier():  # TRL unpacks a list of one name
        model_args.lora_target_modules = [target]  # and PEFT takes a text for a pattern of whole paths
    for key in given.from_command_line:
        value = next(getattr(config, key) for config in parsed if hasattr(config, key))
        keys[key] = value.value if isinstance(value, Enum) else value
    return RunConfig(args=args, trainer_args=trainer_args, model_args=model_args, given=keys)


def _precision(keys: Overrides) -> dict[str, bool]:
    """Return the default of `bf16` where it is not TRL's: without a GPU, training is in float32."""
    on_cpu = str(keys.get("use_cpu")).lower() in TRUE or not torch.accelerator.is_available()
    return {"bf16": False} if on_cpu else {}


def _words(key: str, value: object) -> list[str]:
    """Write a key and its value as a command line would."""
    if value is None or value == []:
        return []
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
    return [f"--{key}={value}"]


def save_resolved(run: RunConfig, path: Path) -> None:
    """Write the resolved config, with the versions it ran with as comments."""
    packages = ("rlkit-llm", "trl", "transformers", "torch")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    header = f"# python {sys.version.split()[0]}, {', '.join(versions)}\n"
    atomic_write(path, header + yaml.safe_dump(run.resolved(), sort_keys=False))
