"""The reward interface: what a reward function looks like and how it is called.

A reward is a plain function of one rollout. Its parameters name the columns it reads::

    def total_variation(completion: str, truth: list[float], tolerance: float = 0.01) -> float | None:
        ...

It returns a number, or None if it does not apply to the rollout. Any failure (an exception, NaN, a value that
is not a number, a timeout, a worker that crashed) marks the rollout *invalid*, with a reason. Invalid is not
a score of 0: the trainer excludes the rollout from the loss.

Rewards that look at several rollouts are recognized by their signature:

- `def f(group)` scores all rollouts of one task together. It receives the rows of the group and returns one
  value per row. Any other column it names is taken from the first row, since the rows share their task.
- `def f(completions, ...)`, `def f(prompts, ...)` or `def f(completion_ids, **kwargs)` is a TRL reward
  function. It gets what TRL passes: one call for all rollouts that a process has sampled, with the rollouts
  of a prompt next to each other, and the columns of the dataset as lists.

Both return a sequence in the order of the rows. An item may also be an exception: it makes that row invalid.

A reward of any kind may be `async def`; then its calls run concurrently. It may also name these parameters,
which TRL passes, too: `trainer_state` (see `TrainerState`), `log_metric(name, value)`, and
`log_extra(column, values)` with one value per rollout of the call.

Rewards run in worker processes, which are killed on timeout (`rlkit.scoring.runner`), except for two kinds
that run in the trainer's process and **cannot be killed** when they are slow:

- An object with `__call__`, `state_dict` and `load_state_dict` is a stateful reward, whose state is saved in
  checkpoints. It may also define `observe(rollouts)`: after each training batch is scored, the trainer
  passes it the valid rollouts of all ranks, each once, as a list of dicts with `task_id`, `length` and
  `correct`. In that case `__call__` must not change the state. Then every batch is scored with the state from
  before it, all ranks agree, and evaluations, which never call `observe`, leave the state unchanged.
- An object whose attribute `in_process` is true, such as one that uses the trainer's device.

An attribute `time_limit` of a reward, in seconds, replaces the config's `reward_time_limit`.

A row is a mapping with the columns of the dataset and these:

- `prompt`: chat messages, or a string.
- `completion`: text that the model wrote; several assistant turns are joined with newlines.
- `turns`: all messages after the prompt.
- `environment_tokens`: number of tokens after the prompt that the environment wrote.
- `completion_ids`: token ids of the completion. Only training and evaluation set it and the next three.
- `truncated`: whether a limit (tokens, turns or the model's context) ended the rollout.
- `max_length`: the run's `max_completion_length`, in tokens.
- `stopped`: whether a stop string ended the completion, which then has no EOS token in `completion_ids`.
- `length`: number of tokens of the completion without its EOS token; set if `completion_ids` is.
- `correct`: value of the environment's metric on this rollout, usually 0 or 1. Rewards that read it, and
  rewards of groups, run after the metric. If the metric is None, they do not apply.

Every call gets its own copy of the columns. An invalid row is removed from its group and from the batch of a
TRL function. Arguments that a config passes to a reward (`reward_args`) take precedence over columns of the
same name. This module does not import torch.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

Reward = Callable[..., Any]
Row = Mapping[str, Any]
# A score, None where a reward does not apply, or the exception that makes the row invalid.
Value = float | None | Exception

# Parameters that any reward may name, and that TRL passes in addition to the columns.
EXTRAS = ("trainer_state", "log_extra", "log_metric")
TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", *EXTRAS)
# Columns that the sampler, the runner or a trainer computes. TRL does not have them. A TRL function gets one
# only if it names it without a default value; TRL would leave a default such as `max_length=512` in place.
COMPUTED_COLUMNS = (
    "length",
    "correct",
    "max_length",
    "turns",
    "stopped",
    "truncated",
    "environment_tokens",
    "invalid",
)


@dataclass(frozen=True)
class TrainerState:
    """Progress of training, for rewards that change with it; the names are those of transformers.

    Without a trainer, as in `rlkit eval`, it is that of a finished run.

    Attributes:
        global_step: Number of completed optimizer steps.
        max_steps: Number of optimizer steps of the run.
        epoch: Number of completed epochs, with the fraction of the current one.
        num_train_epochs: Number of epochs of the run, rounded up.
    """

    global_step: int = 1
    max_steps: int = 1
    epoch: float = 1.0
    num_train_epochs: int = 1


FINISHED = TrainerState()


@dataclass
class RewardLog:
    """What one call of a reward has logged.

    Attributes:
        num_rows: Number of rollouts of the call.
        metrics: Names and values of `log_metric`.
        columns: Values of `log_extra`, by column: one string per rollout.
    """

    num_rows: int
    metrics: list[tuple[str, float]] = field(default_factory=list)
    columns: dict[str, list[str]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number, of which the trainer logs the mean over all calls. NaN and infinity are dropped."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"log_metric got {value!r:.80} for {name!r}, which is not a number") from error
        if math.isfinite(number):  # one NaN would make the mean NaN
            self.metrics.append((str(name), number))

    def log_extra(self, column: str, values: Sequence[object]) -> None:
        """Log one value per rollout, to be saved with the rollouts.

        Raises:
            ValueError: The number of values is not the number of rollouts of this call.
        """
        values = list(values)
        if len(values) != self.num_rows:
            raise ValueError(f"log_extra got {len(values)} values of {column!r} for {self.num_rows} rollouts")
        # Strings, because a column of a Parquet file has one type.
        self.columns[str(column)] = [_as_string(value) for value in values]


class RewardCall:
    """A reward with its inspected signature. Calling it scores a row, a group or a batch.

    Attributes:
        reward: The reward function or object.
        scope: What one call scores: a "row", a "group" or a "batch" (a TRL reward function).
        is_async: Whether the reward is a coroutine function.
        reads_correct: Whether it reads the column `correct`.
        required: Columns without a default value.
        columns: All columns that it can read, or None if it accepts any.
        time_limit: Its own time limit in seconds, or None.

    Raises:
        ValueError: The signature does not name the columns that the reward reads.
    """

    def __init__(self, reward: Reward):
        # The signature of a partial still lists the arguments that it fixes; columns must not replace them.
        bound = bound_arguments(reward)
        parameters = [p for p in inspect.signature(reward).parameters.values() if p.name not in bound]
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        _check_keywords(parameters, takes_any)
        self.reward = reward
        self.scope: Literal["row", "group", "batch"] = "row"
        if is_trl(names, takes_any):
            self.scope = "batch"
        elif "group" in names:
            self.scope = "group"
        self.is_async = is_async(reward)
        self.reads_correct = "correct" in names
        self.time_limit: float | None = getattr(unbound(reward), "time_limit", None)
        self._takes_any = takes_any
        self._bound = bound
        self._names = set(names)
        computed = {*EXTRAS}  # parameters that are not columns: this class fills them in
        if self.scope == "group":
            computed |= {"group"}
        elif self.scope == "batch":
            computed |= set(TRL_ARGUMENTS)
        columns = self._names - computed
        self.required = [p.name for p in parameters if p.name in columns and p.default is p.empty]
        if self.scope == "batch":
            columns |= {"prompt", "completion", "completion_ids", "turns"}
        self.columns = None if takes_any or self.scope == "group" else columns

    def __call__(
        self, rows: Sequence[Row], trainer_state: TrainerState = FINISHED, log: RewardLog | None = None
    ) -> list[Value]:
        """Score rows, as `score` does, and run the event loop if the reward is asynchronous."""
        result = self._call_reward(rows, trainer_state, log)
        if inspect.isawaitable(result):
            result = event_loop().run_until_complete(result)
        return self._values(result, len(rows))

    async def score(
        self, rows: Sequence[Row], trainer_state: TrainerState = FINISHED, log: RewardLog | None = None
    ) -> list[Value]:
        """Score a single row (a list of one), the rows of one group, or those of a batch.

        Args:
            rows: Rows to score.
            trainer_state: Progress of training.
            log: Log that receives what the reward logs, or None to drop it.

        Returns:
            One value per row. For a group or a batch, that is an exception where the reward returned one, or
            something that is not a finite number.

        Raises:
            ValueError: The reward returned the wrong number of values or, for a single row, NaN or infinity.
            TypeError: The reward returned no sequence or, for a single row, no number.
            Exception: Any exception of the reward itself.
        """
        result = self._call_reward(rows, trainer_state, log)
        if inspect.isawaitable(result):
            result = await result
        return self._values(result, len(rows))

    def _call_reward(self, rows: Sequence[Row], trainer_state: TrainerState, log: RewardLog | None) -> Any:
        columns = self._batch_arguments(rows) if self.scope == "batch" else self._row_arguments(rows)
        # A copy, so that a reward that changes a list does not change what the next one sees.
        arguments = copy.deepcopy({key: value for key, value in columns.items() if self._reads(key)})
        log = log or RewardLog(len(rows))
        extras = {
            "trainer_state": trainer_state,
            "log_extra": log.log_extra,
            "log_metric": log.log_metric,
        }
        # TRL passes the extras to `**kwargs`, too; for other rewards, those are the columns.
        is_batch = self.scope == "batch"
        arguments |= {
            key: value
            for key, value in extras.items()
            if key in self._names or (is_batch and self._takes_any and key not in self._bound)
        }
        return self.reward(**arguments)

    def _row_arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        row = {**rows[0], "completion": completion_text(rows[0]["completion"])}
        if self.scope == "group":
            row["group"] = [{**r, "completion": completion_text(r["completion"])} for r in rows]
        return row

    def _batch_arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        excluded = {"prompt", "completion", *COMPUTED_COLUMNS} - set(self.required)
        columns = {key for row in rows for key in row if key not in excluded}
        arguments: dict[str, Any] = {key: [row.get(key) for row in rows] for key in columns}
        arguments["prompts"] = [row.get("prompt") for row in rows]
        arguments["completions"] = [trl_completion(row) for row in rows]
        return arguments

    def _reads(self, column: str) -> bool:
        return column in self._names or (self._takes_any and column not in self._bound)

    def _values(self, result: Any, num_rows: int) -> list[Value]:
        """Check what the reward returned, and return one value per row."""
        if self.scope == "row":
            return [as_number(result)]
        # The items of a mapping are its keys, and those of a set have no order.
        if isinstance(result, Mapping | Set | str | bytes) or not hasattr(result, "__iter__"):
            raise TypeError(f"returned a {type(result).__name__}, not a list with one value per rollout")
        values = [_value_or_error(value) for value in result]
        if len(values) != num_rows:
            raise ValueError(f"returned {len(values)} values for {num_rows} rollouts")
        return values


def _check_keywords(parameters: Sequence[inspect.Parameter], takes_any: bool) -> None:
    """Raise ValueError if a reward cannot be called by keyword with the columns it names."""
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY and p.default is p.empty:
            raise ValueError(f"its parameter {p.name!r} is positional-only; remove the `/`")
    if not takes_any and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ValueError("it takes *args, but columns are passed by keyword; name the columns that it reads")


def _value_or_error(value: Any) -> Value:
    if isinstance(value, Exception):
        return value
    try:
        return as_number(value)
    except Exception as error:  # the value may be any object
        return error


def _as_string(value: object) -> str:
    if isinstance(value, str):
        return str.__str__(value)  # exactly a string, because the trainer may not know the subclass
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def bound_arguments(reward: Reward) -> set[str]:
    """Return the names of the arguments that a `functools.partial` fixes; columns must not replace them."""
    names: set[str] = set()
    while isinstance(reward, functools.partial):
        names |= reward.keywords.keys()
        reward = reward.func
    return names


def is_async(reward: Reward) -> bool:
    """Return whether a reward is a coroutine function, or an object whose `__call__` is one."""
    reward = unbound(reward)
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


def unbound(reward: Reward) -> Reward:
    """Return the function or object without the arguments that a `functools.partial` fixes."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward


def is_trl(names: Sequence[str], takes_any: bool) -> bool:
    """Return whether the parameters are those of a TRL reward function.

    Such a function either has a parameter `completions` or `prompts` or, like TRL's own overlong punishment,
    has `completion_ids` and `**kwargs` but no `completion`.

    Args:
        names: Names of the parameters that can be passed by keyword.
        takes_any: Whether the function takes `**kwargs`.
    """
    ids_only = "completion_ids" in names and "completion" not in names
    return bool({"completions", "prompts"} & set(names)) or (ids_only and takes_any)


def call_reward(reward: Reward, row: Row) -> float | None:
    """Score one row with a reward of any kind. A reward of groups or batches receives a single row.

    Raises:
        ValueError, TypeError: The value is not a finite number. A bool counts as a number.
        Exception: Any exception of the reward itself.
    """
    return raise_errors(RewardCall(reward)([row]))[0]


def raise_errors(values: Sequence[Value]) -> list[float | None]:
    """Return the values of a reward; raise the first one that is an exception."""
    scores: list[float | None] = []
    for value in values:
        if isinstance(value, Exception):
            raise value
        scores.append(value)
    return scores


def conversation_row(task: Row, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Build the reward row of a scripted conversation: the task's columns, `turns` and `completion`.

    It has no token columns, since no model wrote it.
    """
    return {**task, "turns": list(turns), "completion": completion_text(turns)}


def single_turn_row(task: Row, completion: str) -> dict[str, Any]:
    """Build the reward row of a single-turn completion."""
    return conversation_row(task, [{"role": "assistant", "content": completion}])


def as_trl_reward(reward: Reward, name: str) -> Callable[..., list[float | None]]:
    """Convert a reward of any kind to a TRL reward function called `name`.

    Exceptions of the reward propagate, as TRL expects. A group is a run of adjacent rows with the same
    `task_id`, or with the same prompt if there is no such column. With several processes TRL can split a
    group, so the batch size of each process must be a multiple of the group size.
    """
    call = RewardCall(reward)

    def trl_reward(
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[Any] | None = None,
        *,
        trainer_state: Any = FINISHED,
        log_extra: Callable[[str, list[str | None]], None] = ignore,
        log_metric: Callable[[str, float], None] = ignore,
        **columns: list[Any],
    ) -> list[float | None]:
        data = columns | {"prompt": prompts, "completion": completions}
        if completion_ids is not None:
            data["completion_ids"] = completion_ids
        rows = [{key: data[key][i] for key in data} for i in range(len(completions))]
        groups = split_groups(rows) if call.scope == "group" else [[row] for row in rows]
        values: list[float | None] = []
        logged: dict[str, list[str | None]] = {}  # None for rows about which the reward logged nothing
        for group in groups:
            log = RewardLog(len(group))
            start = len(values)
            values += raise_errors(call(group, trainer_state, log))
            for column, strings in log.columns.items():
                logged.setdefault(column, [None] * len(rows))[start : start + len(group)] = strings
            for metric, value in log.metrics:
                log_metric(metric, value)
        for column, padded in logged.items():
            log_extra(column, padded)
        return values

    # A TRL function is passed through; the partial only gives it the name that TRL logs it under.
    function = functools.partial(reward) if call.scope == "batch" else trl_reward
    function.__name__ = name  # type: ignore[union-attr]
    return function


def split_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Split rows into runs of adjacent rows that belong to the same task, as TRL orders them."""
    return [list(group) for _, group in groupby(rows, lambda row: row.get("task_id", row["prompt"]))]


def as_number(value: Any) -> float | None:
    """Return the value of a reward as a float, or None. NumPy and torch scalars count as numbers.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is NaN or infinite.
    """
    if getattr(value, "ndim", None) == 0:  # duck typing, since torch must not be imported here
        if getattr(value, "mask", False):  # numpy.ma.masked, whose item() is 0
            raise ValueError("returned a masked value")
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        raise TypeError(f"returned {value!r:.80}, which is not a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError("returned a number that is too large for a float") from error
    if not math.isfinite(number):
        raise ValueError(f"returned {number}")
    return number


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a completion as a string: the assistant's messages, joined with newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(m["content"] or "" for m in completion if m.get("role", "assistant") == "assistant")


def trl_completion(row: Row) -> str | list[dict[str, Any]]:
    """Return the completion in TRL's format: all messages after a chat prompt, a string after a string."""
    completion, prompt = row["completion"], row.get("prompt")
    if not isinstance(completion, str) or not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return completion
    turns = row.get("turns")
    return list(turns) if turns else [{"role": "assistant", "content": completion}]


def completion_length(row: Row) -> int:
    """Return the number of tokens of a completion without its EOS token."""
    # A completion cut off by a token limit has no EOS token, and neither has one that a stop string ended.
    # A rollout that ran out of turns is truncated, too, although it may end with EOS; then EOS is counted.
    has_eos = not (row.get("truncated", False) or row.get("stopped", False))
    return max(len(row["completion_ids"]) - has_eos, 0)


def ignore(*args: object, **kwargs: object) -> None:
    """Replace TRL's `log_extra` and `log_metric` where there is no trainer to log to."""


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of async rewards.

    All calls share it, because an HTTP client that a reward keeps is bound to the loop that created it.
    """
    return asyncio.new_event_loop()
