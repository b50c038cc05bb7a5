"""rlkit's own keys of a run, as dataclasses: what they mean, their defaults, and which values they refuse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlkit.arguments.presets import ESTIMATORS, PRESETS, UTILITIES
from rlkit.errors import UserError, check_choice

ALGORITHMS = tuple(PRESETS)
MAPPINGS = ("environment_args", "reward_args", "guards")  # keys that hold mappings
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
        check_choice("algorithm", self.algorithm, ALGORITHMS)
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
            check_choice("demonstrations", self.demonstrations, DEMONSTRATIONS)


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
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("utility", self.utility, UTILITIES)
        check_choice("estimator", self.estimator, ESTIMATORS)
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


def parse_environment_args(texts: Sequence[str]) -> dict[str, Any]:
    """Read the options of an environment: one JSON object, or key=value pairs whose values may be JSON."""
    if len(texts) == 1 and texts[0].lstrip().startswith("{"):
        try:
            return json.loads(texts[0])
        except json.JSONDecodeError as error:
            raise UserError(f"--args is not JSON: {error}") from error
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--args {text!r}: write a JSON object, or key=value")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:  # a bare word is a text
            pairs[key] = value
    return pairs
