"""What rlkit trains on: an environment gives tasks, and rewards judge the answers to them.

An environment is a class with an id, a method that makes tasks, and a table of rewards::

    class Addition(Environment):
        id = "addition-v1"
        metric = "correct"
        rewards = {"correct": lambda completion, total: float(completion.strip() == str(total))}
        reward_weights = {"correct": 1.0}

        def tasks(self, split, n=None, seed=0):
            ...  # datasets.Dataset with columns prompt, task_id, total

        def answer(self, task):
            return str(task["total"])

A task is a row of a dataset: `prompt` (chat messages), `task_id` (durable: the same content has the same
id), and whatever columns the rewards read. A reward is a plain function that names those columns
(see `rlkit.reward`). This module knows no task and does not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rlkit.reward import Reward, call_reward, single_turn

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Turn:
    """One assistant turn: the task's row, and the messages so far, the assistant's last."""

    task: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reply:
    """What an environment answers to a turn: text to append, the end of the rollout, or `invalid`.

    `invalid` says why the environment itself failed; such a rollout is left out of the loss, never scored 0.
    `record` is what rewards and the saved rollouts are to know of the reply besides its text; in `turns` it
    stands in the reply's message, in the model's own where the rollout ends there. `role` is the message's,
    "tool" for what a called function gave.
    """

    text: str | None = None
    done: bool = False
    invalid: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    role: str = "user"


@dataclass(frozen=True)
class Candidates:
    """The documents to rank for one query: what `rlkit rank` trains an encoder on.

    Attributes:
        query: text of the query.
        passages: texts of the documents to rank.
        grades: relevance of each passage; 0 is not relevant.
        ideal: grades of all relevant documents, highest first, whether among the passages or not.
    """

    query: str
    passages: Sequence[str]
    grades: Sequence[int]
    ideal: Sequence[int]


@dataclass(frozen=True)
class HeldOutMeans:
    """The evaluations of one run, by name in the order of training: what `Environment.report_panels` plots.

    Attributes:
        run: name of the run.
        color: color of the run in every plot of the report, as "#rrggbb".
        metric: mean of the environment's metric over tasks, by evaluation.
        rewards: mean of each reward over rollouts, by evaluation.
    """

    run: str
    color: str
    metric: Mapping[str, float]
    rewards: Mapping[str, Mapping[str, float]]


class Environment(ABC):
    """Tasks and the rewards that come with them. Subclasses take their options as constructor keywords."""

    id: ClassVar[str]  # "causal-v1": the version rises when scores would change
    metric: ClassVar[str]  # the reward that evaluations and reports show: 1.0 is right, 0.0 is wrong
    rewards: Mapping[str, Reward]  # every reward it offers, by name
    reward_weights: Mapping[str, float]  # those used unless a config says otherwise, with their weights
    breakdown: Sequence[str] = ()  # columns by which an evaluation is broken down
    max_turns: int = 1
    stop: Sequence[str] = ()  # strings that end an assistant turn
    tools: Sequence[Mapping[str, Any]] = ()  # functions that a model may call, as chat templates take them

    @abstractmethod
    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Make `n` tasks of a split ("train", "dev", "test"); `None` is the environment's own number.

        Task i depends on `(split, seed, i)` alone. Raises `UserError` on an unknown split.
        """

    @abstractmethod
    def answer(self, task: Mapping[str, Any]) -> str | None:
        """The right answer to a task, written as a model would: all default rewards give it full marks.

        None where only what the environment replies to a `script` is right.
        """

    def solution(self, task: Mapping[str, Any]) -> str | None:
        """A worked solution that ends in the right answer, or None where the environment cannot write one."""
        return None

    def script(self, task: Mapping[str, Any]) -> Sequence[str] | None:
        """What one who knows would write turn by turn, or None where it is not known.

        Of environments of several turns: `rlkit check` plays it, and `rlkit sft` demonstrates it.
        """
        return None

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Answer a batch of assistant turns. Only environments of several turns define it."""
        raise TypeError(f"{self.id} is a single-turn environment")

    def candidate_documents(self, task: Mapping[str, Any]) -> Candidates | None:
        """The documents that an encoder is to rank, or None where the task is not about ranking."""
        return None

    def check_item(self, item: Mapping[str, Any]) -> bool:
        """Return whether the exact solver agrees with a published answer (`rlkit check --items`).

        Args:
            item: one line of the file.

        Raises:
            InvalidItemError: the line is not a valid item; the message says what is missing.
            UserError: the solver rejects the item.
        """
        raise TypeError(f"{self.id} has no exact solver")

    @classmethod
    def report_panels(cls, runs: Sequence[HeldOutMeans]) -> Sequence[Mapping[str, Any]]:
        """Return further plots for the report: mappings with `title`, `note`, `traces` and `layout`.

        Traces and layout are plotly's, the `title` of each axis as text. A class method: a report loads no
        tasks.
        """
        return []

    def advance(self, step: int, steps: int, score: float | None) -> Mapping[str, float]:
        """Move on in the training: a curriculum changes here what comes next, on all processes alike.

        Called after each sampling of training with the step that the next one is for, the number of steps in
        all, and the mean of the metric in the sampling that is over, None where nothing could be judged.
        Returns what to log of that sampling. An environment that remembers has `state_dict` and
        `load_state_dict`, and a checkpoint keeps what they say.
        """
        return {}

    def score(self, task: Mapping[str, Any], completion: str) -> dict[str, float | None]:
        """All rewards of one answer, by name. For tests, docs and people at a prompt; errors are raised."""
        row = single_turn(task, completion)
        return {name: call_reward(reward, row) for name, reward in self.rewards.items()}
