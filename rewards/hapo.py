"""HAPO: reward answers that are shorter than the shortest correct one so far (arXiv 2505.11225).

For every task, the history has h: the length of its shortest correct answer (`history="min"`) or the mean
length of all of them ("mean"). With x = L / h and the shape "cosine"::

    f = cos(min(x pi/2, pi))          1 at length 0, 0 at h, -1 from 2h
    correct: max(f, floor)      wrong: min(f, 0)      no history: 0

The shape "linear" is the ablation in the paper's code (HCY123902/HAPO, `utils.py`). A correct answer gets
1 - x up to h, 0 up to 1.1h and 1.1 - x beyond, but at least `floor`. A wrong answer gets 0 up to 1.1h and
1.1 - x beyond, but at least -1.

The reward is **added** to the correctness reward, both with weight 1: `rewards: [correct, hapo]`. A wrong
answer no longer than h is never penalized, and if weight * floor > -1, every correct answer outscores every
wrong one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

SHAPES = ("cosine", "linear")
HISTORIES = ("min", "mean")
SLACK = 1.1  # "linear" has no penalty up to this multiple of h


class HistoryLength:
    """Stateful reward with a length history per task; `task_id` must identify a task throughout a run.

    Scoring does not change the history: the rollouts of a batch are scored with the history before the batch,
    and `observe` adds them afterwards. So all ranks agree, and the first batch that solves a task gets 0.

    The history holds `capacity` tasks; beyond that, the task solved least recently is evicted. A task takes
    about 120 bytes ("min") or 175 bytes ("mean"), as measured in `tests/rewards/test_hapo.py`.
    """

    def __init__(
        self,
        weight: float = 1.0,
        floor: float = -0.7,
        shape: str = "cosine",
        history: str = "min",
        capacity: int = 1_000_000,
    ):
        """Create a reward with an empty history.

        Args:
            weight: Factor of the reward, in [0, 1]; the paper's w.
            floor: Minimum for a correct answer before the weight is applied, in [-1, 0); the paper's c.
            shape: Shape of the reward over the length: "cosine" or "linear".
            history: Statistic over all correct answers so far: "min" or "mean".
            capacity: Maximum number of tasks in the history.

        Raises:
            ValueError: An argument is out of range or not one of the choices.
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be between 0 and 1, not {weight}")
        if not -1 <= floor < 0:
            raise ValueError(f"floor must be at least -1 and below 0, not {floor}")
        if shape not in SHAPES:
            raise ValueError(f"there is no shape {shape!r}; use {' or '.join(SHAPES)}")
        if history not in HISTORIES:
            raise ValueError(f"there is no history {history!r}; use {' or '.join(HISTORIES)}")
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        self.weight = weight
        self.floor = floor
        self.shape = shape
        self.history = history
        self.capacity = capacity
        # Keyed by task, least recently solved first. "min": the shortest length; "mean": sum and count.
        self._lengths: dict[int, int] = {}
        self._counts: dict[int, int] = {}

    def __call__(self, task_id: str, length: int, correct: float) -> float:
        """Score one rollout against the history of its task.

        Args:
            task_id: Id of the task.
            length: Number of completion tokens.
            correct: Value of the environment's metric; below 1 is wrong.
        """
        h = self.reference(task_id)
        if h is None:
            return 0.0
        # h is 0 if an empty completion was correct.
        ratio = length / h if h else (math.inf if length else 1.0)
        is_correct = correct >= 1.0
        if self.shape == "cosine":
            value = math.cos(min(math.pi / 2 * ratio, math.pi))
        elif ratio <= SLACK:
            value = max(1 - ratio, 0.0)
        else:
            value = max(SLACK - ratio, -1.0)
        return self.weight * (max(value, self.floor) if is_correct else min(value, 0.0))

    def reference(self, task_id: str) -> float | None:
        """Return h of a task, in tokens; None if the task has not been solved."""
        key = task_key(task_id)
        if key not in self._lengths:
            return None
        return self._lengths[key] / self._counts.get(key, 1)

    def observe(self, rollouts: Iterable[Mapping[str, Any]]) -> None:
        """Add the correct rollouts to the history.

        Args:
            rollouts: Rollouts with `task_id`, `length` and `correct`. Pass each rollout only once: with
                `history="mean"`, a repeat would count twice.
        """
        for rollout in rollouts:
            if rollout["correct"] >= 1.0:
                self._add(task_key(rollout["task_id"]), int(rollout["length"]))
        self._evict()

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain lists, which both JSON and `torch.load(weights_only=True)` accept."""
        keys = list(self._lengths)
        state: dict[str, Any] = {
            "history": self.history,
            "tasks": keys,
            "lengths": list(self._lengths.values()),
        }
        if self.history == "mean":
            state["counts"] = [self._counts[key] for key in keys]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved history.

        Raises:
            ValueError: The state was saved with the other `history` option.
        """
        if state["history"] != self.history:
            raise ValueError(
                f"the saved history is {state['history']!r}, but this run uses {self.history!r}; "
                f"set history={state['history']!r} to resume"
            )
        tasks: Sequence[int] = state["tasks"]
        self._lengths = dict(zip(tasks, state["lengths"], strict=True))
        self._counts = dict(zip(tasks, state["counts"], strict=True)) if self.history == "mean" else {}
        self._evict()  # `capacity` may be smaller than in the saved run

    def _add(self, key: int, length: int) -> None:
        previous = self._lengths.pop(key, None)  # reinserting moves the task to the end
        if self.history == "mean":
            self._lengths[key] = length + (previous or 0)
            self._counts[key] = self._counts.get(key, 0) + 1
        else:
            self._lengths[key] = length if previous is None else min(previous, length)

    def _evict(self) -> None:
        for key in list(islice(self._lengths, max(len(self._lengths) - self.capacity, 0))):
            del self._lengths[key]
            self._counts.pop(key, None)


def task_key(task_id: str) -> int:
    """Return a 64-bit hash of a task id: the same in every process, and small even if ids are long."""
    return int.from_bytes(blake2b(str(task_id).encode(), digest_size=8).digest(), "little")
