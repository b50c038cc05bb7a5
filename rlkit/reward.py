"""What a reward is, and how one is called: on one rollout, on a group of rollouts, or the way TRL does.

A reward is a plain function of one rollout that names the columns it reads::

    def total_variation(completion: str, truth: list[float], tolerance: float = 0.01) -> float | None:
        ...

It returns a number, or None where it does not apply. Whatever else happens (an exception, a NaN, a text, more
seconds than allowed, a dead process) makes the rollout *invalid with a reason*, which is not a score of 0: a
trainer leaves such a rollout out of the loss. Three more shapes are known by their parameters:

- `def f(group)` judges all answers to one task together: it gets the rows of the group and returns one value
  a row. Other columns it names come from the first row, since the rows of a group share their task.
- `def f(completions, ...)` or `def f(completion_ids, **kwargs)` is a TRL reward function and works unchanged,
  called with a batch of one.
- an object with `__call__`, `state_dict` and `load_state_dict` has memory. It runs in the trainer's own
  process, because that is where its state is saved: it can fail, but **cannot be killed** when it is slow.
  It may also define `observe(rollouts)`: after a training batch is scored the trainer shows it the valid
  rollouts of all ranks, each once, as a list of dicts with `task_id`, `length` and `correct`. Then
  `__call__` must not change the state, so that a batch is judged by what was known before it, ranks agree,
  and an evaluation, which never calls `observe`, leaves no trace.

All others run in worker processes that are killed when they outrun their time (`rlkit.scoring.runner`). Any
of them may be `async def`.

A row is a mapping of the data set's columns and of

- `prompt` and `completion` (the text; of several turns what the model wrote, joined by line ends);
- `turns`, all messages after the prompt, and `environment_tokens`, those that the model did not write;
- `completion_ids`, `truncated` (whether the limit cut it off) and `max_length` (that limit, in tokens), from
  a trainer or an evaluation;
- `stopped`: a stop string ended it, so that there is no end token among `completion_ids`;
- `length`: the tokens of the completion, its end token not counted, where there are `completion_ids`;
- `correct`: the value of the environment's metric on this rollout, mostly 0 or 1. Rewards that name it, and
  rewards of a group, run after the metric. Where the metric is None they do not apply either.

A row that has become invalid is left out of its group. Arguments that a config gives a reward are fixed: no
column replaces them. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

Reward = Callable[..., Any]
Row = Mapping[str, Any]

# TRL passes these to a reward function besides the columns.
TRL_EXTRAS = ("trainer_state", "log_extra", "log_metric")
TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", *TRL_EXTRAS)


class RewardCall:
    """A reward with its signature read once.

    Attributes:
        per_group: it judges the rows of a whole group at once.
        trl: it is a TRL reward function.
        reads_correct: it names the column `correct`.
        required: the columns it cannot do without.
        columns: all columns it can read, or None when it takes any.
    """

    def __init__(self, reward: Reward):
        bound = bound_arguments(reward)
        parameters = [p for p in inspect.signature(reward).parameters.values() if p.name not in bound]
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.reward = reward
        self.trl = is_trl(names, takes_any)
        self.per_group = "group" in names and not self.trl
        self.reads_correct = "correct" in names
        self._any = takes_any
        self._bound = bound
        self._names = set(names)
        own = {"group"} if self.per_group else set(TRL_ARGUMENTS) if self.trl else set()
        self.required = [p.name for p in parameters if p.name in self._names - own and p.default is p.empty]
        read = (self._names - own) | ({"prompt", "completion", "completion_ids"} if self.trl else set())
        self.columns = None if self._any or self.per_group else read

    def __call__(self, rows: Sequence[Row]) -> list[float | None]:
        """Judge the rows of one group, or a single row (a list of one).

        Raises:
            ValueError: the wrong number of values, NaN or infinity.
            TypeError: something that is not a number.
            Exception: whatever the reward itself raises.
        """
        result = self.reward(**(self._trl_arguments(rows) if self.trl else self._arguments(rows)))
        if inspect.isawaitable(result):
            result = event_loop().run_until_complete(result)
        if not (self.trl or self.per_group):
            return [as_number(result)]
        values = [as_number(value) for value in result]
        if len(values) != len(rows):
            raise ValueError(f"returned {len(values)} values for {len(rows)} rollouts")
        return values

    def _arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        row = {**rows[0], "completion": completion_text(rows[0]["completion"])}
        if self.per_group:
            row["group"] = [{**r, "completion": completion_text(r["completion"])} for r in rows]
        return {key: value for key, value in row.items() if self._reads(key)}

    def _trl_arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        columns = {key for key in rows[0] if key not in ("prompt", "completion")}
        arguments: dict[str, Any] = {key: [row[key] for row in rows] for key in columns}
        arguments["prompts"] = [row.get("prompt") for row in rows]
        arguments["completions"] = [trl_completion(row) for row in rows]
        arguments |= {"trainer_state": None, "log_extra": ignore, "log_metric": ignore}
        return {key: value for key, value in arguments.items() if self._reads(key)}

    def _reads(self, column: str) -> bool:
        return column in self._names or (self._any and column not in self._bound)


def bound_arguments(reward: Reward) -> set[str]:
    """Return the names of the arguments that a `functools.partial` fixes: no column may replace them."""
    names: set[str] = set()
    while isinstance(reward, functools.partial):
        names |= reward.keywords.keys()
        reward = reward.func
    return names


def is_trl(names: Sequence[str], takes_any: bool) -> bool:
    """Tell a TRL reward function by its parameters.

    It names `completions`; or, as TRL's own overlong punishment, only `completion_ids`, and then `**kwargs`.
    """
    ids_only = "completion_ids" in names and "completion" not in names
    return "completions" in names or (ids_only and takes_any)


def call_reward(reward: Reward, row: Row) -> float | None:
    """Call a reward of any shape on one row, passing the columns it names; a group is a group of one.

    Raises:
        ValueError, TypeError: the value is not a finite number (a bool counts as one).
        Exception: whatever the reward itself raises.
    """
    return RewardCall(reward)([row])[0]


def conversation_row(task: Row, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What rewards read of a conversation that no model had: the task's columns, `turns` and `completion`."""
    return {**task, "turns": list(turns), "completion": completion_text(turns)}


def single_turn(task: Row, completion: str) -> dict[str, Any]:
    """The same of one answer."""
    return conversation_row(task, [{"role": "assistant", "content": completion}])


def as_trl_reward(reward: Reward, name: str) -> Callable[..., list[float | None]]:
    """Make any reward a TRL reward function called `name`. Errors propagate, as TRL has it.

    A group is a run of neighbours with the same `task_id`, or the same prompt where there is no such column.
    On several processes TRL may split a group: keep the batch of a process a multiple of the group's size.
    """
    call = RewardCall(reward)

    def trl_reward(
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[Any] | None = None,
        **columns: list[Any],
    ) -> list[float | None]:
        data = {key: value for key, value in columns.items() if key not in TRL_EXTRAS}
        data |= {"prompt": prompts, "completion": completions}
        if completion_ids is not None:
            data["completion_ids"] = completion_ids
        rows = [{key: data[key][i] for key in data} for i in range(len(completions))]
        groups = split_groups(rows) if call.per_group else [[row] for row in rows]
        return [value for group in groups for value in call(group)]

    # A TRL function needs no translation, only the name under which TRL logs it.
    function = functools.partial(reward) if call.trl else trl_reward
    function.__name__ = name  # type: ignore[union-attr]
    return function


def split_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Split rows into runs of neighbours that belong to the same task."""
    return [list(group) for _, group in groupby(rows, lambda row: row.get("task_id", row["prompt"]))]


def as_number(value: Any) -> float | None:
    """Return the value of a reward as a float, or None; a scalar of numpy or torch counts as a number."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        raise TypeError(f"returned {value!r:.80}, which is not a number")
    if not math.isfinite(value):
        raise ValueError(f"returned {value}")
    return float(value)


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a completion as text: of chat messages, what the assistant wrote."""
    if isinstance(completion, str):
        return completion
    return "\n".join(m["content"] or "" for m in completion if m.get("role", "assistant") == "assistant")


def trl_completion(row: Row) -> str | list[dict[str, Any]]:
    """Return the completion as TRL gives it: messages where the prompt is messages, a string otherwise."""
    completion, prompt = row["completion"], row.get("prompt")
    if isinstance(completion, str) and isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return [{"role": "assistant", "content": completion}]
    return completion


def completion_length(row: Row) -> int:
    """Return the tokens of a completion without its EOS token; a truncated or stopped one has none."""
    ended = not (row.get("truncated", False) or row.get("stopped", False))
    return max(len(row["completion_ids"]) - ended, 0)


def ignore(*args: object, **kwargs: object) -> None:
    """Stand in for TRL's `log_extra` and `log_metric`: a worker process has no trainer to log to."""


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Return the one event loop of async rewards: a client that a reward keeps stays bound to a live loop."""
    return asyncio.new_event_loop()
