"""rlkit's own keys of a run, as dataclasses: what they mean, their defaults, and which belong together."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from rlkit.arguments.presets import ESTIMATORS, PRESETS
from rlkit.errors import UserError

ALGORITHMS = tuple(PRESETS)
MAPPINGS = ("environment_args", "reward_args", "guards")  # keys that hold mappings
DEMONSTRATIONS = ("answer", "solution")
OBJECTIVES = ("plackett_luce", "infonce", "ranknet", "distillation", "wasserstein")


def key(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and a line for `--help`."""
    return field(default=default, metadata={"help": text})


@dataclass
class TaskArguments:
    """rlkit's keys for any kind of run."""

    environment: str | None = key(None, "Environment: an id, package.module:Class or path/file.py:Class.")
    environment_args: str | None = key(None, "Arguments of the environment: a mapping.")
    fold: str | None = key(None, "Only the tasks of a fold, FILE:NAME.")
    num_tasks: int | None = key(None, "Number of training tasks. Default: the environment's own.")
    resume: bool = key(False, "Resume from the last checkpoint of output_dir.")
    resume_anyway: bool = key(False, "Resume even if the environment or algorithm differs.")
    overwrite: bool = key(False, "Delete the run directory if it exists.")
    evaluation_split: str = key("test", "Split of the held-out tasks.")
    evaluation_tasks: int = key(0, "Number of held-out tasks, before and after. 0: none.")
    evaluation_steps: int = key(0, "Number of steps between evaluations. 0: none between.")
    evaluation_batch_size: int = key(64, "Completions generated at a time, per process.")
    reward_time_limit: float = key(10.0, "Seconds per rollout; a slower one is invalid.")
    reward_workers: int = key(1, "Number of processes that run rewards, per rank.")

    def mapping(self, key: str) -> dict[str, Any]:
        """Return the value of a key that holds a mapping, such as `environment_args`."""
        text = getattr(self, key)
        return {} if text is None else json.loads(text)


@dataclass
class TrainArguments(TaskArguments):
    """rlkit's keys for `rlkit train`."""

    rewards: list[str] | None = key(None, "Names, package.module:function or path/file.py:function.")
    reward_args: str | None = key(None, "Arguments of rewards, by name: {hapo: {weight: 0.5}}.")
    reward_error_budget: float = key(0.2, "Share of invalid rollouts above which a run may stop.")
    reward_error_patience: int = key(3, "Consecutive batches above the budget before it stops.")
    algorithm: str = key("grpo", f"One of {', '.join(ALGORITHMS)}.")
    dynamic_sampling: bool = key(False, "Replace groups whose rewards are all equal.")
    dynamic_sampling_attempts: int = key(4, "Maximum number of times a batch is topped up.")
    group_by: str | None = key(None, "hrpo: column whose values group rollouts.")
    group_minimum: int = key(2, "hrpo: minimum number of rollouts in a group.")
    difficulty_weighting: bool = key(False, "Weight advantages by the solve rate (GRPO-LEAD).")
    shared_prefix: bool = key(True, "Compute the prompt of a group once in the loss.")
    max_turns: int | None = key(None, "Maximum number of turns. Default: the environment's own.")
    max_turn_tokens: int | None = key(None, "Maximum number of tokens of one turn.")
    max_reply_tokens: int | None = key(None, "Maximum tokens of one environment reply.")
    reply_time_limit: float = key(60.0, "Seconds for the environment to reply.")
    weights_dir: str | None = key(None, "Folder shared with vLLM servers on other machines.")
    guards: str | None = key(None, "warn, stop or off, by guard: {length: stop}.")


@dataclass
class SFTArguments(TaskArguments):
    """rlkit's keys for `rlkit sft`."""

    demonstrations: str = key(
        "answer",
        "Imitate the bare answer, a worked solution, or best:FILE, the best answers of an evaluation.",
    )
    max_completion_length: int = key(256, "Maximum number of tokens of an answer.")


@dataclass
class RankArguments(TaskArguments):
    """rlkit's keys for `rlkit rank`."""

    objective: str = key("plackett_luce", f"One of {', '.join(OBJECTIVES)}.")
    utility: str = key("ndcg", "Utility of a ranking: ndcg or rr, the reciprocal rank.")
    cutoff: int = key(10, "Number of ranks that count for the utility.")
    rankings: int = key(16, "Rankings drawn for each query at each step.")
    estimator: str = key("placement_loo", f"Policy gradient estimator: one of {', '.join(ESTIMATORS)}.")
    temperature: float = key(0.05, "A score is the cosine of query and document divided by this.")
    adapter_rank: int = key(0, "Rank of a residual on a frozen encoder. 0: train the encoder.")
    listwise: int = key(0, "Number of candidates in the text of their query (E2Rank). 0: none.")

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
