"""rlkit's own config keys as dataclasses, with their defaults and the text for `--help`.

All other keys belong to TRL, transformers and PEFT and keep their names (`rlkit.arguments.schema`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from rlkit.arguments.presets import ESTIMATORS, PRESETS
from rlkit.errors import UserError

ALGORITHMS = tuple(PRESETS)
# Keys that hold a mapping. TRL's parser cannot parse one, so they are typed `str` and contain JSON.
MAPPINGS = ("environment_args", "reward_args", "reward_concurrency", "guards")
DEMONSTRATIONS = ("answer", "solution", "mixed", "example")
ADAPTER_SIDES = ("query", "document", "both")
OBJECTIVES = (
    "plackett_luce",
    "infonce",
    "ranknet",
    "softmax_margin",
    "pointwise",
    "distillation",
    "wasserstein",
)


def key(default: Any, description: str) -> Any:
    """Return a dataclass field with a default value and a description for `--help`."""
    return field(default=default, metadata={"help": description})


@dataclass
class TaskArguments:
    """rlkit's keys that `train`, `sft` and `rank` share."""

    environment: str | None = key(None, "Environment: id, package.module:Class or path/file.py:Class.")
    environment_args: str | None = key(None, "Arguments of the environment, as a mapping.")
    fold: str | None = key(None, "Fold to take the tasks from, as FILE:NAME.")
    num_tasks: int | None = key(None, "Number of training tasks. Default: set by the environment.")
    resume: bool = key(False, "Resume from the last checkpoint in output_dir.")
    resume_anyway: bool = key(False, "Resume even if the environment or algorithm changed.")
    overwrite: bool = key(False, "Delete output_dir first if it exists.")
    evaluation_split: str = key("test", "Split of the held-out tasks: train, dev or test.")
    evaluation_tasks: int = key(0, "Number of held-out tasks to evaluate before and after training. 0: none.")
    evaluation_steps: int = key(0, "Steps between evaluations. 0: only before and after training.")
    evaluation_batch_size: int = key(64, "Batch size of evaluation, per process.")
    reward_time_limit: float = key(10.0, "Timeout of a reward in seconds; the rollout is then invalid.")
    reward_workers: int = key(1, "Number of reward processes per rank.")
    reward_concurrency: str | None = key(None, "Maximum concurrent calls by reward: {judge: 16}.")
    reward_retries: int = key(3, "Retries of a reward whose service is unavailable.")
    guards: str | None = key(None, "Guard actions (warn, stop, off): {gradient: stop}.")

    def mapping(self, key: str) -> dict[str, Any]:
        """Return the value of a key that holds a mapping, such as `environment_args`, as a dict."""
        value = getattr(self, key)
        return {} if value is None else json.loads(value)


@dataclass
class TrainArguments(TaskArguments):
    """rlkit's keys for `rlkit train`."""

    rewards: list[str] | None = key(None, "Rewards: names, package.module:function or path/file.py:function.")
    reward_args: str | None = key(None, "Reward arguments by name: {hapo: {weight: 0.5}}.")
    reward_error_budget: float = key(0.2, "Maximum fraction of invalid rollouts in a batch.")
    reward_error_patience: int = key(3, "Number of consecutive batches over the budget that ends the run.")
    algorithm: str = key("grpo", f"Algorithm: {', '.join(ALGORITHMS)}.")
    dynamic_sampling: bool = key(False, "Replace groups whose rewards are all equal (DAPO).")
    dynamic_sampling_attempts: int = key(4, "Maximum number of replacement rounds per batch.")
    group_by: str | None = key(None, "hrpo: column whose values define the groups.")
    group_minimum: int = key(2, "hrpo: minimum number of rollouts per group.")
    difficulty_weighting: bool = key(False, "Weight advantages by solve rate (GRPO-LEAD).")
    shared_prefix: bool = key(True, "Compute a group's prompt only once in the loss.")
    max_turns: int | None = key(None, "Maximum number of assistant turns. Default: set by the environment.")
    max_turn_tokens: int | None = key(None, "Maximum tokens per turn. Default: all that remain.")
    max_reply_tokens: int | None = key(None, "Maximum tokens per reply. Default: all that remain.")
    reply_time_limit: float = key(60.0, "Timeout of environment replies, in seconds.")
    weights_dir: str | None = key(None, "Folder shared with vLLM servers on other machines.")


@dataclass
class SFTArguments(TaskArguments):
    """rlkit's keys for `rlkit sft`."""

    demonstrations: str = key(
        "answer",
        "Training targets: answer, solution (worked solution), mixed (answers to half of the "
        "tasks, solutions to the others), example (answers of people), or best:FILE, the best answers in "
        "a saved evaluation.",
    )
    max_completion_length: int = key(256, "Maximum number of completion tokens.")


@dataclass
class RankArguments(TaskArguments):
    """rlkit's keys for `rlkit rank`."""

    objective: str = key("plackett_luce", f"Training objective: {', '.join(OBJECTIVES)}.")
    utility: str = key("ndcg", "Utility of a ranking: ndcg or rr (reciprocal rank).")
    cutoff: int = key(10, "Rank cutoff of the utility, as in nDCG@10.")
    rankings: int = key(16, "Number of rankings sampled per query and step.")
    estimator: str = key("placement_loo", f"Policy gradient estimator: {', '.join(ESTIMATORS)}.")
    cross_encoder: bool = key(False, "Train a cross-encoder, which reads query and document together.")
    temperature: float | None = key(
        None, "Temperature that divides the scores. Default: 0.05, and 1 for a cross-encoder."
    )
    similarity: str | None = key(None, "Similarity: cosine or dot. Default: the encoder's.")
    adapter_rank: int = key(0, "Rank of a low-rank residual on a frozen encoder. 0: train the encoder.")
    adapter_side: str | None = key(
        None, "Side with the residual of adapter_rank: query, document or both. Default: query."
    )
    listwise: int = key(0, "Number of candidates in the query text (E2Rank). 0: none.")
    max_seq_length: int | None = key(
        None, "Maximum tokens of a query or passage. Default: the encoder's own."
    )
    query_prompt: str | None = key(None, "String before a query. Default: the encoder's.")
    passage_prompt: str | None = key(None, "String before a passage. Default: the encoder's.")
    trust_remote_code: bool = key(False, "Run Python code that comes with the encoder.")
    first_stage_documents: int = key(
        10_000, "Maximum documents to rank for the held-out queries before and after training. 0: none."
    )

    def __post_init__(self) -> None:
        """Reject combinations of keys that contradict each other; raises UserError."""
        if self.utility == "rr" and self.estimator == "pl_rank":
            raise UserError(
                "estimator pl_rank requires utility ndcg, which is a sum over documents; "
                "choose another estimator for rr"
            )
        if self.estimator.endswith("loo") and self.rankings < 2:
            raise UserError(
                f"estimator {self.estimator} uses a leave-one-out baseline: rankings must be at least 2, "
                f"not {self.rankings}"
            )
        if self.temperature is None:
            self.temperature = 1.0 if self.cross_encoder else 0.05
        if self.adapter_side is not None and not self.adapter_rank:
            raise UserError("adapter_side is for the residual of adapter_rank; set adapter_rank or remove it")
        if self.adapter_rank and self.adapter_side is None:
            self.adapter_side = "query"
        if self.cross_encoder:
            for name in ("adapter_rank", "listwise", "similarity", "query_prompt", "passage_prompt"):
                if getattr(self, name) not in (None, 0):  # "" is an encoder's prompt, too
                    raise UserError(f"{name} is for encoders of single strings; remove it or cross_encoder")
            if self.objective == "wasserstein":
                raise UserError(
                    "objective wasserstein compares all documents of a batch with all queries, which takes a "
                    "cross-encoder a forward pass each; use plackett_luce, infonce, pointwise, ranknet, "
                    "softmax_margin or distillation"
                )
        if self.listwise and self.adapter_rank:
            raise UserError("listwise trains all weights of the encoder; set adapter_rank to 0")
