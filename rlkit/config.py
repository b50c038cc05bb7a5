"""One flat set of keys: rlkit's own say what to train on, every other one is TRL's under its own name.

A YAML file and the command line are read by the same parser, the command line last. `--config FILE` names
the file; `--key value` overrides a key of it. A key that nobody knows is an error that names the nearest
known one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig, SFTConfig, TrlParser

from rlkit.algorithms.plackett_luce import ESTIMATORS, UTILITIES
from rlkit.algorithms.presets import PRESETS, check_preset
from rlkit.environment import Environment, load_environment
from rlkit.errors import UserError, nearest

ALGORITHMS = tuple(PRESETS)
MAPPINGS = ("environment_args", "reward_args", "guards")  # keys that hold mappings
NOT_KEPT = ("resume", "resume_anyway", "overwrite")  # what was meant for one start of a run
DEMONSTRATIONS = ("answer", "solution")
OBJECTIVES = ("plackett_luce", "infonce", "ranknet", "distillation", "wasserstein")


@dataclass
class TaskArguments:
    """rlkit's keys for any kind of run."""

    environment: str | None = field(
        default=None,
        metadata={"help": "Environment to train on: an id, 'package.module:Class' or 'path/file.py:Class'."},
    )
    environment_args: str | None = field(
        default=None, metadata={"help": "Its arguments: a mapping in YAML, JSON on the command line."}
    )
    fold: str | None = field(
        default=None,
        metadata={"help": "Only the tasks of a fold, FILE:NAME, of scripts/split_tasks.py."},
    )
    num_tasks: int | None = field(
        default=None, metadata={"help": "Tasks of the train split. Default: the environment's own number."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint of the run directory."}
    )
    resume_anyway: bool = field(
        default=False,
        metadata={"help": "With resume: go on though environment, rewards, algorithm or processes differ."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete the run directory first if it exists."})
    evaluation_split: str = field(default="test", metadata={"help": "Split of the held-out tasks."})
    evaluation_tasks: int = field(
        default=0, metadata={"help": "Held-out tasks to answer greedily before and after. 0 turns it off."}
    )
    evaluation_steps: int = field(
        default=0, metadata={"help": "Also evaluate every so many steps. 0: only before and after."}
    )
    evaluation_batch_size: int = field(
        default=64, metadata={"help": "Completions generated at a time in an evaluation, per process."}
    )
    reward_time_limit: float = field(
        default=10.0, metadata={"help": "Seconds for the rewards of one rollout; then it is invalid."}
    )
    reward_workers: int = field(default=1, metadata={"help": "Processes that run rewards, per rank."})

    def make_environment(self) -> Environment:
        """Build the environment that the keys name; raises UserError."""
        if self.environment is None:
            raise UserError("no environment given: set the key 'environment', e.g. --environment causal-v1")
        environment = load_environment(self.environment, **self.mapping("environment_args"))
        if self.fold is not None:
            from rlkit.evaluation.splits import keep_fold

            keep_fold(environment, self.fold)
        return environment

    def mapping(self, key: str) -> dict[str, Any]:
        """The value of a key that holds a mapping, such as `environment_args`; raises UserError."""
        text = getattr(self, key)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{key} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{key} must be a mapping, not {value!r}")
        return value


@dataclass
class TrainArguments(TaskArguments):
    """rlkit's keys for `rlkit train`."""

    rewards: list[str] | None = field(
        default=None,
        metadata={
            "help": "The environment's rewards by name, 'package.module:function' or "
            "'path/file.py:function'. Default: the environment's own. Weights: reward_weights."
        },
    )
    reward_args: str | None = field(
        default=None,
        metadata={
            "help": "Arguments of rewards, by the name in `rewards`: a mapping of mappings in YAML, JSON on "
            "the command line. E.g. {hapo: {weight: 0.5}}."
        },
    )
    algorithm: str = field(default="grpo", metadata={"help": f"One of: {', '.join(ALGORITHMS)}."})
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Replace groups whose rewards are all alike by freshly sampled prompts."},
    )
    dynamic_sampling_attempts: int = field(
        default=4, metadata={"help": "Most times that a batch is topped up; then it is used as it is."}
    )
    group_by: str | None = field(
        default=None,
        metadata={"help": "With algorithm hrpo: the column whose values group rollouts, e.g. 'hops'."},
    )
    group_minimum: int = field(
        default=2, metadata={"help": "With group_by: rollouts that a group needs, else its advantages are 0."}
    )
    difficulty_weighting: bool = field(
        default=False,
        metadata={"help": "Weight advantages by the group's solve rate, as GRPO-LEAD does."},
    )
    max_turns: int | None = field(
        default=None, metadata={"help": "Most turns of a rollout. Default: the environment's own."}
    )
    max_turn_tokens: int | None = field(
        default=None,
        metadata={"help": "Most tokens of one turn; max_completion_length is the limit of all together."},
    )
    max_reply_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens of one reply of the environment; the rest is cut."}
    )
    reply_time_limit: float = field(
        default=60.0,
        metadata={"help": "Seconds for the environment to answer; then the rollouts are invalid."},
    )
    weights_dir: str | None = field(
        default=None,
        metadata={
            "help": "With vllm_mode server: a folder that trainer and servers share, for weights on their "
            "way. Servers on this machine need none."
        },
    )
    guards: str | None = field(
        default=None,
        metadata={
            "help": "What a guard does, by its name: a mapping to warn, stop or off, e.g. {length: off}."
        },
    )
    reward_error_budget: float = field(
        default=0.2, metadata={"help": "Share of invalid rollouts in a batch above which a run may stop."}
    )
    reward_error_patience: int = field(
        default=3, metadata={"help": "Batches running above the budget that stop the run."}
    )
    shared_prefix: bool = field(
        default=True,
        metadata={
            "help": "Compute each prompt of a micro-batch once in the loss. Models whose attention does not "
            "allow it take TRL's own forward."
        },
    )

    def __post_init__(self) -> None:
        _check_choice("algorithm", self.algorithm, ALGORITHMS)
        for key in ("max_turns", "max_turn_tokens", "max_reply_tokens", "reply_time_limit"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise UserError(f"{key} must be above 0, not {value}")


@dataclass
class SFTArguments(TaskArguments):
    """rlkit's keys for `rlkit sft`."""

    demonstrations: str = field(
        default="answer",
        metadata={
            "help": "What to imitate: the bare 'answer', a worked 'solution', or 'best:FILE', the best "
            "answers of an evaluation with several samples (rejection sampling)."
        },
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Most tokens of an answer in evaluations."}
    )

    def __post_init__(self) -> None:
        if not self.demonstrations.startswith("best:"):
            _check_choice("demonstrations", self.demonstrations, DEMONSTRATIONS)


@dataclass
class RankArguments(TaskArguments):
    """rlkit's keys for `rlkit rank`."""

    objective: str = field(
        default="plackett_luce",
        metadata={
            "help": "What is learned from: plackett_luce (the expected utility of rankings), or a supervised "
            "loss: infonce, ranknet, distillation or wasserstein."
        },
    )
    utility: str = field(default="ndcg", metadata={"help": "Utility of a ranking: ndcg or rr."})
    cutoff: int = field(default=10, metadata={"help": "Ranks that count for the utility."})
    rankings: int = field(default=16, metadata={"help": "Rankings drawn for each query at each step."})
    estimator: str = field(
        default="placement_loo",
        metadata={"help": "Of the policy gradient: reinforce, loo, placement, placement_loo or pl_rank."},
    )
    temperature: float = field(
        default=0.05, metadata={"help": "A score is the cosine of query and document divided by this."}
    )
    adapter_rank: int = field(
        default=0, metadata={"help": "Freeze the encoder and train a residual of this rank. 0: train it all."}
    )
    listwise: int = field(
        default=0,
        metadata={
            "help": "Candidates that stand in the text of their query, as in E2Rank. 0: the query alone."
        },
    )

    def __post_init__(self) -> None:
        _check_choice("objective", self.objective, OBJECTIVES)
        _check_choice("utility", self.utility, UTILITIES)
        _check_choice("estimator", self.estimator, ESTIMATORS)
        if self.utility == "rr" and self.estimator == "pl_rank":
            raise UserError(
                "pl_rank needs the utility ndcg, a sum over documents; take another estimator for rr"
            )
        rankings = 2 if self.estimator.endswith("loo") else 1
        least = {"cutoff": 1, "rankings": rankings, "adapter_rank": 0, "listwise": 0}
        if self.listwise and self.adapter_rank:
            raise UserError("listwise trains the whole encoder: leave adapter_rank at 0")
        for key, value in least.items():
            if getattr(self, key) < value:
                raise UserError(f"{key} must be at least {value}, not {getattr(self, key)}")
        if self.temperature <= 0:
            raise UserError(f"temperature must be above 0, not {self.temperature}")


@dataclass
class Run:
    """A parsed run: rlkit's keys, TRL's trainer keys, the model's keys, and those that were given."""

    task: Any  # TrainArguments, SFTArguments or RankArguments
    trainer: Any  # GRPOConfig, SFTConfig or TrainingArguments
    model: ModelConfig
    given: dict[str, Any]

    def keys(self) -> dict[str, Any]:
        """Every key and its value."""
        return {**vars(self.model), **vars(self.trainer), **vars(self.task)}

    def resolved(self) -> dict[str, Any]:
        """The keys that make the same run again: those given, and rlkit's own with their defaults."""
        own = {f.name: getattr(self.task, f.name) for f in fields(self.task)}
        own |= {key: self.task.mapping(key) for key in MAPPINGS if key in own}
        keys = {**own, **{key: self.given[key] for key in self.given if key not in own}}
        keys |= {"output_dir": self.trainer.output_dir, "seed": self.trainer.seed}
        return {key: value for key, value in keys.items() if key not in NOT_KEPT}


class Parser(TrlParser):
    """TrlParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise argparse's complaint as a UserError, without its page of usage."""
        raise UserError(message)


@dataclass
class PolicyConfig(GRPOConfig):
    """TRL's GRPOConfig that also takes a single rollout a prompt, as HRPO has it."""

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


def parse_train(arguments: Sequence[str]) -> Run:
    """Parse the keys of `rlkit train`, with those that its algorithm sets; raises UserError."""
    run = _parse("train", TrainArguments, PolicyConfig, arguments)
    check_preset(run.task.algorithm, run.keys())
    return run


def parse_sft(arguments: Sequence[str]) -> Run:
    """Parse the keys of `rlkit sft`; raises UserError."""
    return _parse("sft", SFTArguments, SFTConfig, arguments)


def parse_rank(arguments: Sequence[str]) -> Run:
    """Parse the keys of `rlkit rank`; raises UserError."""
    return _parse("rank", RankArguments, TrainingArguments, arguments)


def _parse(kind: str, task: type, trainer: type, arguments: Sequence[str]) -> Run:
    parts: list[Any] = [task, trainer, ModelConfig]
    parser = Parser(parts, prog=f"rlkit {kind}", allow_abbrev=False)
    known = {action.dest for action in parser._actions} - {"help"}
    keys, arguments = _read_config(list(arguments), known)
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
    if parsed[1].eval_strategy != "no":
        raise UserError(
            "eval_strategy is TRL's own evaluation: set evaluation_tasks and evaluation_steps instead"
        )
    given = keys | _given([options.get(word.split("=")[0]) for word in arguments], parsed)
    return Run(task=parsed[0], trainer=parsed[1], model=parsed[2], given=given)


def _with_preset(keys: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The keys of an algorithm below those of the file; the command line, read later, is above both."""
    algorithm = keys.get("algorithm", "grpo")
    for i, word in enumerate(arguments):
        if word.split("=")[0] == "--algorithm":
            algorithm = word.partition("=")[2] or (arguments[i + 1] if i + 1 < len(arguments) else "")
    _check_choice("algorithm", algorithm, ALGORITHMS)
    return {**PRESETS[algorithm].keys, **keys}


def _read_config(arguments: list[str], known: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
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


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; raises UserError with the line of a mistake."""
    try:
        keys = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict):
        raise UserError(f"{path} must hold keys and values")
    return keys


def _words(key: str, value: Any) -> list[str]:
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


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"there is no {key} {value!r}{nearest(value, choices)}")


def save_resolved(run: Run, path: Path) -> None:
    """Write the resolved config, with the versions it ran with as comments."""
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("rlkit", "trl", "transformers", "torch")]
    header = f"# python {sys.version.split()[0]}, {', '.join(versions)}\n"
    path.write_text(header + yaml.safe_dump(run.resolved(), sort_keys=False))
