"""The environment interface: an environment generates tasks, and its rewards score the answers.

An environment is a class with an id, a method that generates tasks, and a table of rewards::

    class Addition(Environment):
        id = "addition-v1"
        metric = "correct"
        rewards = {"correct": lambda completion, total: float(completion.strip() == str(total))}
        reward_weights = {"correct": 1.0}

        def tasks(self, split, n=None, seed=0):
            ...  # datasets.Dataset with columns prompt, task_id, total

        def answer(self, task):
            return str(task["total"])

A task is a dataset row with the columns `prompt` (chat messages), `task_id` (stable: the same content always
has the same id), and whatever the rewards read. A reward is a plain function whose parameters name the
columns it reads (see `rlkit.reward`).

A single-turn environment needs nothing else. A multi-turn one also defines `respond` and sets `max_turns`.
This module contains nothing specific to one task and does not import torch.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rlkit.reward import Reward, call_reward, single_turn_row

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Turn:
    """One assistant turn that the environment replies to.

    Attributes:
        task: Dataset row of the task.
        messages: Messages of the rollout so far, the prompt included. The last one is the assistant's.
    """

    task: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reply:
    """The environment's reply to an assistant turn.

    Attributes:
        text: Content of the message to append, or None for no message.
        done: True to end the rollout.
        invalid: Reason why the environment itself failed, such as a search server that is down, or None.
            The rollout is then excluded from the loss; it is never scored 0.
        record: Data about the reply that rewards can read and that is saved with the rollout. It is merged
            into the reply's message in `turns`, or into the assistant's if the rollout ends without a reply.
        role: Role of the appended message; "tool" for the result of a function call.
    """

    text: str | None = None
    done: bool = False
    invalid: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    role: str = "user"


@dataclass(frozen=True)
class Candidates:
    """The documents to rank for one query: a training example of `rlkit rank`.

    Attributes:
        query: Query text.
        passages: Text of each candidate document.
        grades: Relevance grade of each passage, a whole number or a teacher's score; 0 is not relevant.
        ideal: Grades of all relevant documents, highest first, including those that are not candidates. The
            ideal DCG of nDCG is computed from it.
        ids: Id of each passage's document. With ids, in-batch objectives do not use another query's candidate
            as a negative if this query's judgments say that it is relevant. Empty if there are no ids.
        relevant: Ids of the documents whose grades are `ideal`, in the same order.
        excluded: Ids of documents that must not be ranked for this query.
        possible_answers: Ids of documents that may answer the query although nobody has judged them, such as
            the page that the query is taken from. In-batch objectives do not use them as negatives.
        passages_are_queries: Whether the passages are queries, and the query is a document for which they are
            ranked (PROP). Encoders have different prompts and adapters for the two.
    """

    query: str
    passages: Sequence[str]
    grades: Sequence[float]
    ideal: Sequence[float]
    ids: Sequence[str] = ()
    relevant: Sequence[str] = ()
    excluded: Sequence[str] = ()
    possible_answers: Sequence[str] = ()
    passages_are_queries: bool = False


@dataclass(frozen=True)
class HeldOutMeans:
    """Means of the held-out evaluations of one run, which `Environment.report_panels` can plot.

    Attributes:
        run: Name of the run.
        color: Color of the run in every plot of the report, as "#rrggbb".
        metric: Mean of the environment's metric over tasks, by evaluation name in training order.
        rewards: Mean of each reward over rollouts, by evaluation name in training order.
    """

    run: str
    color: str
    metric: Mapping[str, float]
    rewards: Mapping[str, Mapping[str, float]]


class Environment(ABC):
    """Base class of environments. Subclasses take their options as keyword arguments of the constructor."""

    id: ClassVar[str]  # e.g. "causal-v1"; increment the version when a prompt or a score changes
    metric: ClassVar[str]  # name of the reward that evaluations report: 1.0 is right, 0.0 is wrong
    rewards: Mapping[str, Reward]  # all rewards that a config can name
    reward_weights: Mapping[str, float]  # the default rewards and their weights
    breakdown: Sequence[str] = ()  # columns by whose values evaluations are broken down
    max_turns: int = 1  # maximum number of assistant turns
    stop: Sequence[str] = ()  # stop strings, each of which ends an assistant turn
    requires_scripts: bool = False  # whether `rlkit check` fails if no task has a script
    tools: Sequence[Mapping[str, Any]] = ()  # JSON schemas of the functions that a model can call

    @abstractmethod
    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> datasets.Dataset:
        """Generate the tasks of a split.

        Task i must depend on `(split, seed, i)` alone, so that more tasks extend the same sequence.

        Args:
            split: "train", "dev" or "test".
            n: Number of tasks; None for the environment's default.
            seed: Random seed.

        Returns:
            A dataset with the columns `prompt`, `task_id` and those that the rewards read.

        Raises:
            UserError: The environment has no such split.
        """

    @abstractmethod
    def answer(self, task: Mapping[str, Any]) -> str | None:
        """Return the reference answer, in the format a model should write it.

        `rlkit check` requires it to earn the maximum of every default reward. Return None if no single
        completion can be right, as when only a dialogue (`script`) solves the task.
        """

    def solution(self, task: Mapping[str, Any]) -> str | None:
        """Return a worked solution that ends with the reference answer, or None if there is none.

        `rlkit sft` trains on it with `demonstrations: solution` or `mixed`.
        """
        return None

    def example(self, task: Mapping[str, Any]) -> str | None:
        """Return an example of a good first turn, such as a person's, or None if there is none.

        It need not earn the maximum reward: an environment whose best answers are unknown has examples in
        place of reference answers. `rlkit sft` trains on it with `demonstrations: example`, and `rlkit check`
        requires that examples earn more than those of other tasks.
        """
        return None

    def script(self, task: Mapping[str, Any]) -> Sequence[str] | None:
        """Return the assistant turns of a reference solution, or None if there is none.

        Only multi-turn environments define it. `rlkit check` plays the turns against `respond`, and
        `rlkit sft` trains on the resulting rollout.
        """
        return None

    def respond(self, turns: Sequence[Turn]) -> Sequence[Reply]:
        """Reply to a batch of assistant turns, one reply per turn. Only multi-turn environments define it.

        If it raises, it is called again for each turn, and only the rollouts that fail then become invalid.
        """
        raise TypeError(f"{self.id} is a single-turn environment")

    def respond_at_once(self, turn: Turn) -> Reply | None:
        """Return the reply to a turn that needs no search engine or other service, or None.

        A turn that gets a reply here is not passed to `respond`. So an answer, for example, survives an
        engine that hangs.
        """
        return None

    def read_tool_calls(self, turn: str) -> Sequence[tuple[str, Mapping[str, Any]]] | None:
        """Return the name and the arguments of each function call in a turn, or None if it is not known.

        Before training, the chat template of the model writes a call, which must be read back.
        """
        return None

    def candidate_documents(self, task: Mapping[str, Any]) -> Candidates | None:
        """Return the documents that `rlkit rank` trains an encoder to rank, or None if there are none."""
        return None

    def documents(self) -> Iterator[tuple[str, str]] | None:
        """Return all documents that the candidates are chosen from, as (id, passage), or None if unknown.

        `rlkit rank` ranks them to find out whether the trained encoder still retrieves well without a first
        stage. The passages have the form of `Candidates.passages`. An id repeats if a document has several
        passages: it is ranked by its best one.
        """
        return None

    def check_item(self, item: Mapping[str, Any]) -> bool:
        """Return whether the exact solver agrees with a published answer (`rlkit check --items`).

        Args:
            item: One parsed line of the JSONL file.

        Raises:
            InvalidItemError: The line is not a valid item; the message says what is missing.
            UserError: The solver rejects the item.
        """
        raise TypeError(f"{self.id} has no exact solver")

    @classmethod
    def report_panels(cls, runs: Sequence[HeldOutMeans]) -> Sequence[Mapping[str, Any]]:
        """Return additional plots for the HTML report.

        It is a class method because a report builds no environment and loads no tasks.

        Args:
            runs: Held-out means of each run in the report.

        Returns:
            One mapping per plot with the keys `title`, `note`, `traces` and `layout`. Traces and layout are
            plotly's; an axis title in the layout is a plain string.
        """
        return []

    def advance(self, step: int, steps: int, score: float | None) -> Mapping[str, float]:
        """Prepare a curriculum for a sampling step of training. Called with the same values on all ranks.

        It is called before the first sampling step of a run, and after every one, also the last. A stateful
        environment also defines `state_dict` and `load_state_dict`; checkpoints then contain its state, and a
        resumed run does not repeat the first call.

        Args:
            step: Number of the next sampling step, from 1; `steps` + 1 after the last one.
            steps: Total number of sampling steps of the run.
            score: Mean of the metric over the rollouts just sampled, or None before the first sampling step
                and if no rollout could be scored.

        Returns:
            Metrics to log for the sampling step that just ended; the first call's are not logged.
        """
        return {}

    def score(self, task: Mapping[str, Any], completion: str) -> dict[str, float | None]:
        """Score one answer with all rewards and return the values by name.

        Meant for tests, docs and interactive use: an error in a reward is raised.
        """
        row = single_turn_row(task, completion)
        return {name: call_reward(reward, row) for name, reward in self.rewards.items()}


def hashed_choice(text: str, n: int) -> int:
    """Return one of 0, …, n - 1 that depends on a string alone, not on the split, the seed or the position.

    Args:
        text: String that identifies a task.
        n: Number of choices, a power of two up to 256, so that all have the same probability.
    """
    return hashlib.sha256(text.encode()).digest()[0] % n
