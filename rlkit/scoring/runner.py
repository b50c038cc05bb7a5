"""Scoring batches of rollouts with rewards that may fail, hang or crash."""

import math
import sys
import threading
from collections.abc import Mapping, Sequence

import cloudpickle

from rlkit.errors import UserError, check_integer, nearest
from rlkit.reward import FINISHED, Reward, RewardCall, Row, TrainerState, unbound
from rlkit.scoring.batch import ScoreBatch, Scores
from rlkit.scoring.dispatch import Dispatcher, WorkUnit
from rlkit.scoring.limits import START_TIMEOUT, TimeLimits
from rlkit.scoring.worker import Call, attempt

MAX_CONCURRENT = 64  # concurrent calls of an async reward, unless the config sets another number


class RewardRunner:
    """Scores batches of rollouts, with a time limit per call that is enforced by killing the worker.

    Rewards run in worker processes (`rlkit.scoring.dispatch`), except those that must run in the trainer's
    process. A worker that exceeds the limit or crashes is replaced, and only the rows of the call to blame
    become invalid: one row, a group, or the batch of a TRL reward function. Use the runner as a context
    manager, so that no worker process outlives it.

    Rewards that read `correct` and rewards of groups run after the metric; rewards of groups and batches run
    after those of a row. A row that becomes invalid is not scored further and is removed from its group and
    its batch. Rewards that run after the metric do not get rows to which it does not apply.

    Args:
        rewards: Rewards by name, in the order of the columns of `Scores.values`.
        time_limit: Seconds for one call of a reward on one row. A group or a batch has this times its size.
        num_workers: Number of worker processes for rewards that are not async.
        metric: Name of the reward whose value becomes the column `correct`, or None.
        max_concurrent: Maximum number of concurrent calls, by reward. By default, `MAX_CONCURRENT` for an
            async reward, and the number of workers for others.
        num_retries: Number of retries of a call that fails because a service is unavailable, with exponential
            backoff and within the time limit.
        start_timeout: Seconds for the first call of a reward in a worker, in which it may import something.

    Attributes:
        names: Names of the rewards, in the order of the columns of `Scores.values`.
        stateful: Stateful rewards by name, for checkpoints.

    Raises:
        UserError: A limit or the number of workers is not positive, `max_concurrent` names no reward, a
            reward cannot be pickled, or the metric is missing or reads `correct` itself.
        RewardError: A worker could not load the rewards.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        time_limit: float = 10.0,
        num_workers: int = 1,
        *,
        metric: str | None = None,
        max_concurrent: Mapping[str, int] | None = None,
        num_retries: int = 3,
        start_timeout: float = START_TIMEOUT,
    ):
        if num_workers < 1:
            raise UserError(f"rewards need at least 1 worker, not {num_workers}")
        self.rewards = dict(rewards)
        self.names = list(rewards)
        self.metric = metric
        for name, reward in rewards.items():
            # torch modules are callable, but a classifier cannot judge text without its tokenizer.
            if not callable(reward) or hasattr(reward, "named_parameters"):
                raise UserError(
                    f"the reward {name!r} must be a function, not {reward!r:.60}; for a reward model, use "
                    "rlkit.scoring.reward_model:RewardModel"
                )
        self._calls = {name: RewardCall(reward) for name, reward in rewards.items()}
        self._check_metric()
        self.stateful = {name: reward for name, reward in rewards.items() if is_stateful(reward)}
        self._check_observers()
        self._in_process = {name for name, reward in rewards.items() if runs_in_process(reward)}
        self._num_retries = num_retries
        self._lock = threading.Lock()
        limits = {
            name: time_limit if call.time_limit is None else call.time_limit
            for name, call in self._calls.items()
        }
        for name, limit in limits.items():
            if not isinstance(limit, int | float) or not 0 < limit < math.inf:
                raise UserError(
                    f"the time limit of reward {name!r} must be a positive number of seconds, not {limit!r}"
                )
        self._limits = TimeLimits(limits, start_timeout)
        self._dispatcher = Dispatcher(
            self._calls,
            self._payloads(),
            num_workers=num_workers,
            limits=self._limits,
            max_concurrent=self._max_concurrent(max_concurrent or {}, num_workers),
            num_retries=num_retries,
        )

    def __call__(
        self, rows: Sequence[Row], group_size: int, trainer_state: TrainerState = FINISHED
    ) -> Scores:
        """Score `B` rows, in which the `group_size` rows of one task are adjacent.

        Args:
            rows: Rows of the rollouts.
            group_size: Number of rows of a group.
            trainer_state: Progress of training, for rewards that read it.

        Raises:
            ValueError: `B` is not a multiple of `group_size`.
        """
        if len(rows) % group_size:
            raise ValueError(f"{len(rows)} rows cannot be divided into groups of {group_size}")
        with self._lock:  # the workers run one batch at a time
            return self._score(rows, group_size, trainer_state)

    def _score(self, rows: Sequence[Row], group_size: int, trainer_state: TrainerState) -> Scores:
        batch = ScoreBatch(rows, self.names)
        row_sets = {
            "row": [range(i, i + 1) for i in range(len(rows))],
            "group": [range(i, i + group_size) for i in range(0, len(rows), group_size)],
            "batch": [range(len(rows))],
        }
        dependent = [name for name in self.names if self._runs_after_metric(name)]
        self._run_rewards(
            [name for name in self.names if name not in dependent], row_sets, batch, trainer_state
        )
        if self.metric is not None:
            batch.add_correct(self.metric)
        self._run_rewards(dependent, row_sets, batch, trainer_state)
        return batch.scores()

    def observe(self, rollouts: Sequence[Row]) -> None:
        """Pass training rollouts to the rewards that define `observe` (see `rlkit.reward`).

        Args:
            rollouts: `task_id`, `length` and `correct` of the valid rollouts of all ranks, each once.
        """
        for reward in self.stateful.values():
            if hasattr(reward, "observe"):
                reward.observe(rollouts)

    def close(self) -> None:
        """Kill the worker processes, and the processes in their groups that rewards have started."""
        self._dispatcher.close()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_metric(self) -> None:
        if self.metric is not None:
            if self.metric not in self._calls:
                raise UserError(
                    f"the metric {self.metric!r} is not one of the rewards{nearest(self.metric, self.names)}"
                )
            if self._calls[self.metric].reads_correct:
                raise UserError(f"the metric {self.metric!r} must not read 'correct', which is its own value")
            return
        for name, call in self._calls.items():
            if "correct" in call.required:
                raise UserError(f"reward {name!r} reads 'correct', but there is no metric")

    def _check_observers(self) -> None:
        for name, reward in self.rewards.items():
            if hasattr(reward, "observe") and name not in self.stateful:
                raise UserError(
                    f"reward {name!r} defines observe, so it must define state_dict and load_state_dict, too"
                )

    def _max_concurrent(self, max_concurrent: Mapping[str, int], num_workers: int) -> dict[str, int]:
        for name, maximum in max_concurrent.items():
            if name not in self._calls:
                raise UserError(
                    f"reward_concurrency has a limit for {name!r}, which is not a reward of this run"
                    f"{nearest(name, self.names)}"
                )
            check_integer(f"reward_concurrency of {name!r}", maximum, minimum=1)
            if name in self._in_process:
                raise UserError(
                    f"reward_concurrency has no effect on {name!r}, which runs in the trainer's process"
                )
        defaults = {
            name: MAX_CONCURRENT if call.is_async else num_workers for name, call in self._calls.items()
        }
        return defaults | dict(max_concurrent)

    def _payloads(self) -> dict[bool, bytes]:
        """Return the pickled rewards that run in workers, async ones (True) and others (False)."""
        payloads = {}
        for is_async in (False, True):
            rewards = {
                name: self.rewards[name]
                for name, call in self._calls.items()
                if call.is_async == is_async and name not in self._in_process
            }
            if rewards:
                payloads[is_async] = _pickle_rewards(rewards)
        return payloads

    def _runs_after_metric(self, name: str) -> bool:
        call = self._calls[name]
        return name != self.metric and (call.scope == "group" or call.reads_correct)

    def _run_rewards(
        self,
        names: Sequence[str],
        row_sets: Mapping[str, Sequence[Sequence[int]]],
        batch: ScoreBatch,
        trainer_state: TrainerState,
    ) -> None:
        """Run these rewards: first those of a row, then those of a group or a batch."""
        for scopes in (("row",), ("group", "batch")):
            stage = [name for name in names if self._calls[name].scope in scopes]
            # Computed for each stage, since rows may have become invalid in the one before.
            units = [
                WorkUnit(name, indices)
                for name in stage
                if name not in self._in_process
                for indices in batch.pending_rows(row_sets[self._calls[name].scope])
            ]
            self._dispatcher.run(units, batch, trainer_state)
            for name in stage:
                if name in self._in_process:
                    for indices in batch.pending_rows(row_sets[self._calls[name].scope]):
                        rows = [batch.rows[i] for i in indices]
                        limit = self._limits.limit(name, len(rows), is_first=False)
                        call = Call(0, name, rows, trainer_state, limit, self._num_retries)
                        # A UserError, such as weights that do not fit the model, would hit every row.
                        reply = attempt(self._calls[name], call, fatal=(UserError,))
                        batch.record(name, indices, reply)


def is_stateful(reward: Reward) -> bool:
    """Return whether checkpoints hold the state of a reward."""
    return hasattr(reward, "state_dict") and hasattr(reward, "load_state_dict")


def runs_in_process(reward: Reward) -> bool:
    """Return whether a reward runs in the trainer's process."""
    return is_stateful(reward) or bool(getattr(unbound(reward), "in_process", False))


def _pickle_rewards(rewards: Mapping[str, Reward]) -> bytes:
    """Pickle rewards; those from files (see `rlkit.registry`) by value, since workers cannot import them."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rlkit_file_"):
            cloudpickle.register_pickle_by_value(module)
    for name, reward in rewards.items():
        try:
            cloudpickle.dumps(reward)
        except Exception as error:
            raise UserError(f"reward {name!r} cannot be pickled for a worker process: {error}") from error
    return cloudpickle.dumps(dict(rewards))
