"""Guards: detect a run that cannot learn or is diverging, then warn once or stop it.

They read the trainer's logs, which are the same on all ranks, so all ranks decide the same. Gradients are
also checked before they are applied, because an optimizer step with a NaN cannot be undone. docs/guards.md
describes each guard and its remedies.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainingArguments

from rlkit.errors import GuardError, UserError, nearest
from rlkit.runs.guard_conditions import (
    BASELINE_STEPS,
    HELP,
    LOGGED,
    NOT_FINITE,
    REWARD_GUARDS,
    REWARD_WINDOW,
    HeldOut,
    Judge,
    RewardWindows,
    overfitting,
)

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "stop", "off")


@dataclass
class Episode:
    """A counter of consecutive steps with a problem, which reports each episode once.

    Attributes:
        steps: Number of consecutive steps with the problem, at most the patience.
        spoken: Whether the episode was reported.
    """

    steps: int = 0
    spoken: bool = False

    def update(self, is_bad: bool, num_steps: int, patience: int) -> bool:
        """Count steps and return whether to report the problem now.

        It is reported after `patience` consecutive steps with the problem. It can be reported again only
        after the same number of steps without it, so that a value that oscillates around its threshold does
        not cause repeated messages.
        """
        if is_bad:
            self.steps = min(self.steps + num_steps, patience)
        else:
            self.steps = max(self.steps - num_steps, 0) if self.spoken else 0
            self.spoken = self.steps > 0
        should_report = self.steps >= patience and not self.spoken
        self.spoken = self.spoken or should_report
        return should_report


@dataclass
class Mean:
    """A weighted mean of logged values, each of which is a mean over several steps."""

    steps: int = 0
    total: float = 0.0

    def add(self, value: float, num_steps: int) -> None:
        """Add a value that is the mean over `num_steps` steps."""
        self.steps += num_steps
        self.total += value * num_steps

    @property
    def value(self) -> float | None:
        """The mean, or None if no value was added."""
        return self.total / self.steps if self.steps else None


class Guards(TrainerCallback):
    """Trainer callback with all guards.

    Add it after the callback that writes metrics, so that those of the step that a guard stops are saved.

    Args:
        actions: "warn", "stop" or "off" by name of the guard. The default is "warn", except that a gradient
            that is not finite stops the run. With "gradient: warn", a step with such a gradient is skipped.
        record: Function that saves a message, such as `RunDirectory.log`. It is called on the main process
            with the step and `{"guards/<name>": message}`.
        logged: Guards that read a logged metric: `LOGGED`, `RANK_LOGGED` or `SFT_LOGGED`.
        reward: Logged metric that training maximizes; None disables `REWARD_GUARDS`.

    Attributes:
        messages: All messages so far, in order.

    Raises:
        UserError: There is no such guard or action.
    """

    def __init__(
        self,
        actions: Mapping[str, object] | None = None,
        record: Callable[[int, dict[str, Any]], None] | None = None,
        logged: Mapping[str, tuple[str, Judge, int]] = LOGGED,
        reward: str | None = "reward",
    ):
        self.logged, self.reward_metric = logged, reward
        names = (*logged, *REWARD_GUARDS) if reward else (*logged,)
        self.actions = {name: _check_action(name, action, names) for name, action in (actions or {}).items()}
        self.record = record
        self.messages: list[str] = []
        self.episodes = {name: Episode() for name in (*names, NOT_FINITE)}
        self.first = {name: Mean() for name in logged}
        self.evaluations: list[HeldOut] = []
        self.reward = Mean()  # since the last evaluation
        self.windows = RewardWindows()
        self._is_main = True
        self._last_steps: dict[str, int] = {}  # step at which each metric was last logged

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Find out whether this is the main process, which alone logs messages."""
        self._is_main = state.is_world_process_zero

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        """Drop gradients that are not finite before the optimizer applies them; raises GuardError.

        With fp16 the loss scaler already does this. DeepSpeed has stepped by this time and exposes no
        gradients, so there `on_log` detects the problem afterwards.
        """
        if args.fp16 or self._action(NOT_FINITE) == "off":
            return
        assert optimizer is not None  # the trainer always passes it by keyword
        finite_by_rank = gather_object([_is_finite(optimizer)])  # ranks may hold different shards
        if all(is_finite is None for is_finite in finite_by_rank):
            return
        problem = None
        if False in finite_by_rank:
            optimizer.zero_grad()  # sets gradients to None, so that the optimizer skips the parameters
            problem = "the gradient is not finite; the step was skipped and the weights are unchanged"
        self._report(NOT_FINITE, problem, state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Check the metrics logged in training; raises GuardError."""
        if not logs or "train_runtime" in logs:  # the summary after training, when there is nothing to stop
            return
        step, norm = state.global_step, logs.get("grad_norm")
        if self.reward_metric is not None and (reward := logs.get(self.reward_metric)) is not None:
            self._check_reward(reward, self._steps_since_log(self.reward_metric, step), step)
        if norm is not None and not args.fp16:
            problem = None
            if not math.isfinite(norm):
                problem = "the gradient is not finite; if the optimizer applied it, the weights are ruined"
            self._report(NOT_FINITE, problem, step)
        for name, (metric, _, _) in self.logged.items():
            value = logs.get(metric)
            if value is not None and (math.isfinite(value) or name == "gradient"):
                self._check_value(name, value, step, args)

    def evaluated(self, step: int, accuracy: float, n_tasks: int, *, metric: str, last: bool = False) -> None:
        """Check a held-out evaluation. Call it on all ranks, including for the evaluation before training.

        The main process's `accuracy` and `n_tasks` are used on all ranks.

        Args:
            step: Number of optimizer steps so far.
            accuracy: Mean of the metric over the tasks; NaN if no task has a score.
            n_tasks: Number of tasks with a score.
            metric: Name of the environment's metric, for the message.
            last: Whether training has ended, so that there is nothing to stop.

        Raises:
            GuardError: The metric fell while the reward rose, and the action of `held_out` is "stop".
        """
        if self.reward_metric is None:
            return
        accuracy, n_tasks = gather_object([(float(accuracy), n_tasks)])[0]
        if not n_tasks or math.isnan(accuracy):
            return
        self.evaluations.append(HeldOut(step, accuracy, n_tasks, self.reward.value))
        self.reward = Mean()
        self._report("held_out", overfitting(self.evaluations, metric), step, last=last)

    def state_dict(self) -> dict[str, Any]:
        """Return all counters and means in types that JSON can represent."""
        return {
            "episodes": {name: asdict(episode) for name, episode in self.episodes.items()},
            "first": {name: asdict(mean) for name, mean in self.first.items()},
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "reward": asdict(self.reward),
            "windows": asdict(self.windows),
            "messages": list(self.messages),
            "seen": dict(self._last_steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`. The actions are not part of it."""
        self.episodes |= {name: Episode(**values) for name, values in state["episodes"].items()}
        self.first |= {name: Mean(**values) for name, values in state["first"].items()}
        self.evaluations = [HeldOut(**values) for values in state["evaluations"]]
        self.reward = Mean(**state["reward"])
        # Checkpoints saved before the guard `reward` existed have no windows.
        self.windows = RewardWindows(**state.get("windows", {}))
        self.messages = list(state["messages"])
        self._last_steps = dict(state["seen"])

    def _steps_since_log(self, metric: str, step: int) -> int:
        """Return the number of steps since a metric was last logged, over which its value is a mean."""
        num_steps = step - self._last_steps.get(metric, 0)
        self._last_steps[metric] = step
        return num_steps

    def _check_reward(self, reward: float, num_steps: int, step: int) -> None:
        """Add a training reward, logged for `num_steps` steps, and check the window if it is complete."""
        if not math.isfinite(reward):
            return
        self.reward.add(reward, num_steps)
        self.windows.rewards.append(reward)
        if len(self.windows.rewards) >= REWARD_WINDOW:
            self._report("reward", self.windows.complete(step), step)

    def _check_value(self, name: str, value: float, step: int, args: TrainingArguments) -> None:
        """Check one logged value, and add it to the baseline if it is from the first steps."""
        metric, judge, patience = self.logged[name]
        num_steps = self._steps_since_log(metric, step)
        first = self.first[name]
        has_baseline = first.steps >= BASELINE_STEPS
        problem = judge(value, first.value if has_baseline else None, args)
        if not has_baseline and math.isfinite(value):
            first.add(value, num_steps)
        if name == "gradient" and not self.episodes[name].steps:
            num_steps = min(num_steps, 1)  # grad_norm is the last step's value, not a mean like the others
        self._report(name, problem, step, num_steps, patience * _steps_per_sampling(args))

    def _report(
        self,
        name: str,
        problem: str | None,
        step: int,
        num_steps: int = 1,
        patience: int = 1,
        *,
        last: bool = False,
    ) -> None:
        """Count steps with or without a problem; warn or raise GuardError if it lasted long enough."""
        action = self._action(name)
        if action == "off" or not self.episodes[name].update(problem is not None, num_steps, patience):
            return
        duration = f" for {patience} consecutive steps" if patience > 1 else ""
        key = "gradient" if name == NOT_FINITE else name
        message = f"guard {key}, step {step}: {problem}{duration}. What to do: {HELP[name]}"
        self.messages.append(message)
        if self._is_main and self.record:
            self.record(step, {f"guards/{key}": message})
        if action == "stop" and not last:
            raise GuardError(f"{message} To continue in this case, set guards: {{{key}: warn}}.")
        if self._is_main:
            logger.warning("%s", message)

    def _action(self, name: str) -> str:
        if name == NOT_FINITE:
            return self.actions.get("gradient", "stop")
        return self.actions.get(name, "warn")


def _check_action(name: str, action: object, names: Collection[str]) -> str:
    """Return the action of a guard; raises UserError if there is no such guard or action."""
    if name not in names:
        raise UserError(f"guards: there is no guard {name!r}{nearest(name, names)}")
    if action is False:  # YAML parses a bare `off` as False
        return "off"
    if not isinstance(action, str) or action not in ACTIONS:
        raise UserError(f"guards: {name} cannot be {action!r}{nearest(str(action), ACTIONS)}")
    return action


def _steps_per_sampling(args: TrainingArguments) -> int:
    """Return the number of optimizer steps on the same completions, which count as one observation."""
    batches = (getattr(args, "steps_per_generation", None) or 1) * getattr(args, "num_iterations", 1)
    return max(1, batches // args.gradient_accumulation_steps)


def _is_finite(optimizer: torch.optim.Optimizer) -> bool | None:
    """Return whether all gradients on this rank are finite, or None if it has or exposes none."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # FSDP2 gradients are DTensors, of which a rank holds only its shard, and that may be empty.
    local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
    local = [grad for grad in local if grad.numel()]
    return math.isfinite(torch.nn.utils.get_total_norm(local)) if local else None
