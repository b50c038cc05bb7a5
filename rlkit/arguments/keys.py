"""rlkit's own keys of a run, as dataclasses: what they mean, their defaults, and which belong together."""

from __future__ import annotations

import json
from dataclasses import Field, dataclass, field
from typing import Any

from rlkit.arguments.presets import ESTIMATORS, PRESETS
from rlkit.errors import UserError, check_choice

ALGORITHMS = tuple(PRESETS)
MAPPINGS = ("environment_args", "reward_args", "guards")  # keys that hold mappings
DEMONSTRATIONS = ("answer", "solution")
OBJECTIVES = ("plackett_luce", "infonce", "ranknet", "distillation", "wasserstein")


def key(group: str, default: Any, text: str) -> Any:
    """Return the field of a key; `group` is its heading in `--help`."""
    return field(default=default, metadata={"help": text, "group": group})


def group_of(own: Field[Any]) -> str:
    """Return the heading of a key in `--help`."""
    return own.metadata["group"]


@dataclass
class TaskArguments:
    """rlkit's keys for any kind of run."""

    environment: str | None = key(
        "tasks", None, "Environment: an id, package.module:Class or path/file.py:Class."
    )
    environment_args: str | None = key("tasks", None, "Its arguments; --environment_args.KEY VALUE sets one.")
    fold: str | None = key("tasks", None, "Only the tasks of a fold, FILE:NAME.")
    num_tasks: int | None = key("tasks", None, "Number of training tasks. Default: the environment's own.")
    resume: bool = key("run directory", False, "Resume from the last checkpoint of output_dir.")
    resume_anyway: bool = key("run directory", False, "Also with another environment, reward or algorithm.")
    overwrite: bool = key("run directory", False, "Delete the run directory if it exists.")
    evaluation_split: str = key("evaluation", "test", "Split of the held-out tasks.")
    evaluation_tasks: int = key("evaluation", 0, "Number of held-out tasks, before and after. 0: none.")
    evaluation_steps: int = key("evaluation", 0, "Number of steps between evaluations. 0: none between.")
    evaluation_batch_size: int = key("evaluation", 64, "Completions generated at a time, per process.")
    reward_time_limit: float = key("rewards", 10.0, "Seconds per rollout; a slower one is invalid.")
    reward_workers: int = key("rewards", 1, "Number of processes that run rewards, per rank.")

    def mapping(self, key: str) -> dict[str, Any]:
        """Return the value of a key that holds a mapping, such as `environment_args`."""
        text = getattr(self, key)
        return {} if text is None else json.loads(text)


@dataclass
class TrainArguments(TaskArguments):
    """rlkit's keys for `rlkit train`."""

    rewards: list[str] | None = key(
        "rewards", None, "Names, package.module:function or path/file.py:function."
    )
    reward_args: str | None = key("rewards", None, "Their arguments, by name: {hapo: {weight: 0.5}}.")
    reward_error_budget: float = key("rewards", 0.2, "Share of invalid rollouts above which a run may stop.")
    reward_error_patience: int = key("rewards", 3, "Batches in a row above the budget that stop it.")
    algorithm: str = key("algorithm", "grpo", f"One of {', '.join(ALGORITHMS)}.")
    dynamic_sampling: bool = key("algorithm", False, "Replace groups whose rewards are all equal.")
    dynamic_sampling_attempts: int = key("algorithm", 4, "Maximum number of times a batch is topped up.")
    group_by: str | None = key("algorithm", None, "hrpo: column whose values group rollouts.")
    group_minimum: int = key("algorithm", 2, "hrpo: minimum number of rollouts in a group.")
    difficulty_weighting: bool = key("algorithm", False, "Weight advantages by the solve rate (GRPO-LEAD).")
    shared_prefix: bool = key("algorithm", True, "Compute the prompt of a group once in the loss.")
    max_turns: int | None = key("rollouts", None, "Maximum number of turns. Default: the environment's own.")
    max_turn_tokens: int | None = key("rollouts", None, "Maximum number of tokens of one turn.")
    max_reply_tokens: int | None = key("rollouts", None, "Maximum tokens of one environment reply.")
    reply_time_limit: float = key("rollouts", 60.0, "Seconds for the environment to reply.")
    weights_dir: str | None = key("rollouts", None, "Folder shared with vLLM servers on other machines.")
    guards: str | None = key("guards", None, "warn, stop or off by guard: {length: stop}.")


@dataclass
class SFTArguments(TaskArguments):
    """rlkit's keys for `rlkit sft`."""

    demonstrations: str = key(
        "demonstrations",
        "answer",
        "Imitate the bare answer, a worked solution, or best:FILE, the best answers of an evaluation.",
    )
    max_completion_length: int = key("evaluation", 256, "Maximum number of tokens of an answer.")

    def __post_init__(self) -> None:
        """Check the kind of demonstrations, which may end in the name of a file."""
        if not self.demonstrations.startswith("best:"):
            check_choice("demonstrations", self.demonstrations, DEMONSTRATIONS)


@dataclass
class RankArguments(TaskArguments):
    """rlkit's keys for `rlkit rank`."""

    objective: str = key("objective", "plackett_luce", f"One of {', '.join(OBJECTIVES)}.")
    utility: str = key("objective", "ndcg", "Utility of a ranking: ndcg or rr, the reciprocal rank.")
    cutoff: int = key("objective", 10, "Number of ranks that count for the utility.")
    rankings: int = key("objective", 16, "Rankings drawn for each query at each step.")
    estimator: str = key(
        "objective", "placement_loo", f"Policy gradient estimator: one of {', '.join(ESTIMATORS)}."
    )
    temperature: float = key("scorer", 0.05, "A score is the cosine of query and document divided by this.")
    adapter_rank: int = key("scorer", 0, "Rank of a residual on a frozen encoder. 0: train the encoder.")
    listwise: int = key("scorer", 0, "Number of candidates in the text of their query (E2Rank). 0: none.")

    def __post_init__(self) -> None:
        """Check which keys exclude each other."""
        if self.utility == "rr" and self.estimator == "pl_rank":
            raise UserError(
                "estimator pl_rank needs utility ndcg, a sum over documents; choose another for rr"
            )
        if self.estimator.endswith("loo") and self.rankings < 2:
            raise UserError(f"estimator {self.estimator} compares rankings: rankings must be at least 2")
        if self.listwise and self.adapter_rank:
            raise UserError("listwise trains the whole encoder: leave adapter_rank at 0")
