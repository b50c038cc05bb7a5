"""Guards: notice a run that cannot learn or that is going wrong, say so once, or stop it.

They read what the trainer logs, which is the same on all ranks, so that all ranks decide alike. Only the
gradient is looked at before it is applied, because a step with a NaN in it cannot be taken back. What each
guard sees and what helps is in docs/guards.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainingArguments

from rlkit.errors import GuardError, UserError, nearest

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "stop", "off")

# Steps running in which nothing can be learned. One batch of hard tasks may do that, twenty are no accident.
PATIENCE = 20
# Steps running beyond a threshold: the metrics of single steps are noisy, these changes are not short.
CONFIRM = 5
# First steps whose mean is what later ones are compared with: more would include what they are to catch.
BASELINE = 10
# Entropy falls in any run that learns, by half or to a fifth; at a twentieth the answers are all alike.
ENTROPY_SHARE = 0.05
# Reasoning grows answers, over hundreds of steps; and from 3 tokens to 12 is no growth worth a word.
LENGTH_FACTOR = 4.0
LENGTH_LEAST = 16  # tokens: shorter first answers count as this long
AT_LIMIT = 0.9  # of max_completion_length: with a mean so long most answers are cut off
# Nats a token. Between vLLM and the trainer in bfloat16 0.01 to 0.02 are usual. Below the least the
# importance weights hardly matter; above the most a token's ratio is off by e^0.5 = 1.65, first steps or not.
SAMPLER_FACTOR = 4.0
SAMPLER_LEAST = 0.05
SAMPLER_MOST = 0.5
# Standard errors of the difference of two accuracies, as if their tasks were different ones. They are the
# same tasks, which makes real noise smaller, and two evaluations must agree.
HELD_OUT_ERRORS = 2.0

Judge = Callable[[float, float | None, TrainingArguments], str | None]


def _truncation(value: float, first: float | None, args: TrainingArguments) -> str | None:
    limit = getattr(args, "max_completion_length", None)
    return f"all completions were cut off at max_completion_length ({limit})" if value >= 1 else None


def _reward_spread(value: float, first: float | None, args: TrainingArguments) -> str | None:
    return "all completions of every group had the same reward" if value >= 1 else None


def _gradient(value: float, first: float | None, args: TrainingArguments) -> str | None:
    if value == 0:
        return "the logged gradient was exactly 0"
    # A finite model gets here with fp16, whose loss scaler leaves such steps out: a few are its way to work.
    return None if math.isfinite(value) else "the logged gradient was not finite"


def _entropy(value: float, first: float | None, args: TrainingArguments) -> str | None:
    if first is None or value >= ENTROPY_SHARE * first:
        return None
    return f"the entropy is {value:.2g} nats a token, {value / first:.1%} of the first steps' {first:.2g}"


def _length(value: float, first: float | None, args: TrainingArguments) -> str | None:
    if first is None or value <= LENGTH_FACTOR * max(first, LENGTH_LEAST):
        return None
    limit = getattr(args, "max_completion_length", None)
    full = f", at the limit of {limit}" if limit and value >= AT_LIMIT * limit else ""
    return f"completions have {value:.0f} tokens on average{full}, in the first steps it was {first:.0f}"


def _sampler(value: float, first: float | None, args: TrainingArguments) -> str | None:
    usual = math.inf if first is None else max(SAMPLER_FACTOR * first, SAMPLER_LEAST)
    if value <= min(usual, SAMPLER_MOST):
        return None
    before = "" if first is None else f", in the first steps it was {first:.2g}"
    return f"the sampler's log-probabilities differ from the trainer's by {value:.2g} nats a token{before}"


# name: (what the trainer logs, what is wrong with a value or None, steps running before it is said)
LOGGED: dict[str, tuple[str, Judge, int]] = {
    "truncation": ("completions/clipped_ratio", _truncation, PATIENCE),
    "reward_spread": ("frac_reward_zero_std", _reward_spread, PATIENCE),
    "gradient": ("grad_norm", _gradient, PATIENCE),
    "entropy": ("entropy", _entropy, CONFIRM),
    "length": ("completions/mean_length", _length, CONFIRM),
    "sampler": ("sampling/sampling_logp_difference/mean", _sampler, CONFIRM),
}
NOT_FINITE = "not_finite"  # the other half of the guard `gradient`, with an action and episodes of its own
NAMES = (*LOGGED, "held_out")
HELP = {
    "truncation": "raise max_completion_length, ask for short answers, teach the model to end (rlkit sft).",
    "reward_spread": "easier or mixed tasks, rlkit sft first, more num_generations, a reward that tells "
    "answers apart; such groups teach nothing.",
    "gradient": "see whether rewards have spread, whether truncated completions are masked, and whether any "
    "weights are trained; such steps teach nothing.",
    NOT_FINITE: "go on from the last checkpoint with a lower learning_rate, in bf16 rather than fp16, and "
    "look at the rewards and completions of this step.",
    "entropy": "answers are all alike and exploration is over: a lower learning_rate, a higher epsilon_high, "
    "temperature or beta; or stop here if the held-out results are good.",
    "length": "see whether longer answers earn more; loss_type dr_grpo, a reward for length or a lower "
    "max_completion_length hold them back.",
    "sampler": "see whether new weights reach the sampler and both use the same dtype, temperature and "
    "template; fewer steps_per_generation bring them closer.",
    "held_out": "the model learns the reward and not the task: read rollouts with high rewards, mend the "
    "reward, raise beta, take more tasks, or keep an earlier checkpoint.",
}


@dataclass
class Episode:
    """How long something has been seen, and whether that was said."""

    steps: int = 0
    spoken: bool = False

    def seen(self, bad: bool, steps: int, patience: int) -> bool:
        """Count `steps` more; return whether to speak now.

        It is said when all of `patience` steps were bad. It may be said again after as many good ones, so
        that a value that swings about its threshold is not said again and again.
        """
        if bad:
            self.steps = min(self.steps + steps, patience)
        else:
            self.steps = max(self.steps - steps, 0) if self.spoken else 0
            self.spoken = self.steps > 0
        speak = self.steps >= patience and not self.spoken
        self.spoken = self.spoken or speak
        return speak


@dataclass
class Mean:
    """A mean over steps of values that are themselves means over some steps."""

    steps: int = 0
    total: float = 0.0

    def add(self, value: float, steps: int) -> None:
        """Add a value that stands for so many steps."""
        self.steps += steps
        self.total += value * steps

    @property
    def value(self) -> float | None:
        """The mean, None of nothing."""
        return self.total / self.steps if self.steps else None


@dataclass
class HeldOut:
    """One evaluation on `n_tasks` held-out tasks; `reward` is the mean in training since the one before."""

    step: int
    accuracy: float
    n_tasks: int
    reward: float | None


def overfitting(evaluations: list[HeldOut], metric: str) -> str | None:
    """Say what is wrong where the reward rose while the held-out metric fell, else return None.

    The last two means must be below the best by more than `HELD_OUT_ERRORS` standard errors, and the reward
    that was logged last above the first one logged after the best.
    """
    best = max(range(len(evaluations)), key=lambda i: (evaluations[i].accuracy, i))
    if best > len(evaluations) - 3:
        return None
    top, last = evaluations[best], evaluations[-1]
    # With evaluation_steps equal to logging_steps the first log comes after the second evaluation.
    rewards = [e.reward for e in evaluations[best + 1 :] if e.reward is not None]
    fell = all(
        top.accuracy - e.accuracy > HELD_OUT_ERRORS * math.hypot(_error(top), _error(e))
        for e in evaluations[-2:]
    )
    if not fell or len(rewards) < 2 or rewards[-1] <= rewards[0]:
        return None
    return (
        f"held-out {metric} fell from {top.accuracy:.1%} at step {top.step} to {last.accuracy:.1%} while the "
        f"training reward rose from {rewards[0]:.3g} to {rewards[-1]:.3g}"
    )


def _error(evaluation: HeldOut) -> float:
    """Binomial standard error; of one more success and failure, so that it is not 0 where all are right."""
    n = evaluation.n_tasks
    share = (evaluation.accuracy * n + 1) / (n + 2)
    return math.sqrt(share * (1 - share) / n)


class Guards(TrainerCallback):
    """Watches a run. Add it after what writes the metrics, so that those of a stopped step are there.

    Args:
        actions: "warn", "stop" or "off" by the guard's name; a name left out warns, except that a gradient
            that is not finite stops. With "warn" the step with such a gradient is left out.
        record: called with the step and `{"guards/<name>": message}` on the main process, such as
            `RunDirectory.log`.

    Attributes:
        messages: all that was said, in order.

    Raises:
        UserError: no such guard, or no such action.
    """

    def __init__(
        self,
        actions: Mapping[str, object] | None = None,
        record: Callable[[int, dict[str, Any]], None] | None = None,
    ):
        self.actions = {name: _checked(name, action) for name, action in (actions or {}).items()}
        self.record = record
        self.messages: list[str] = []
        self.episodes = {name: Episode() for name in (*NAMES, NOT_FINITE)}
        self.first = {name: Mean() for name in LOGGED}
        self.evaluations: list[HeldOut] = []
        self.reward = Mean()  # since the last evaluation
        self._main = True
        self._seen: dict[str, int] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Learn who speaks."""
        self._main = state.is_world_process_zero

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        """Drop gradients that are not finite before they are applied; raises GuardError.

        With fp16 the loss scaler does that. DeepSpeed has stepped by now and shows no gradients; the log of
        this step tells.
        """
        if args.fp16 or self._action(NOT_FINITE) == "off":
            return
        assert optimizer is not None  # the trainer always passes it by keyword
        finite = gather_object([_finite(optimizer)])  # ranks may hold different shards
        if all(rank is None for rank in finite):
            return
        if False in finite:
            optimizer.zero_grad()  # to None: the optimizer passes over these weights
        what = "the gradient is not finite; the step is left out and the weights are as before"
        self._judge(NOT_FINITE, what if False in finite else None, state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Look at what was logged in training; raises GuardError."""
        if not logs or "train_runtime" in logs:  # the summary comes when nothing is left to stop
            return
        step, reward, norm = state.global_step, logs.get("reward"), logs.get("grad_norm")
        if reward is not None:
            self.reward.add(reward, self._steps("reward", step))
        if norm is not None and not args.fp16:
            what = "the gradient is not finite; where the step with it was made the weights are ruined"
            self._judge(NOT_FINITE, None if math.isfinite(norm) else what, step)
        for name, (metric, _, _) in LOGGED.items():
            value = logs.get(metric)
            if value is not None and (math.isfinite(value) or name == "gradient"):
                self._look(name, value, step, args)

    def evaluated(self, step: int, accuracy: float, n_tasks: int, *, metric: str, last: bool = False) -> None:
        """Take in a held-out evaluation; call it on all ranks, also for the one before training.

        Args:
            step: optimizer steps made so far.
            accuracy: mean of the metric over the tasks, NaN where none could be judged.
            n_tasks: how many could be judged. Of both, the main process's value counts on all ranks.
            metric: name of the environment's metric, for the message.
            last: training is over: there is nothing to stop.

        Raises:
            GuardError: the guard `held_out` is to stop the run.
        """
        accuracy, n_tasks = gather_object([(float(accuracy), n_tasks)])[0]
        if not n_tasks or math.isnan(accuracy):
            return
        self.evaluations.append(HeldOut(step, accuracy, n_tasks, self.reward.value))
        self.reward = Mean()
        self._judge("held_out", overfitting(self.evaluations, metric), step, last=last)

    def state_dict(self) -> dict[str, Any]:
        """Everything that was counted, in plain types."""
        return {
            "episodes": {name: asdict(episode) for name, episode in self.episodes.items()},
            "first": {name: asdict(mean) for name, mean in self.first.items()},
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "reward": asdict(self.reward),
            "messages": list(self.messages),
            "seen": dict(self._seen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; actions stay as they are."""
        self.episodes |= {name: Episode(**values) for name, values in state["episodes"].items()}
        self.first |= {name: Mean(**values) for name, values in state["first"].items()}
        self.evaluations = [HeldOut(**values) for values in state["evaluations"]]
        self.reward = Mean(**state["reward"])
        self.messages = list(state["messages"])
        self._seen = dict(state["seen"])

    def _steps(self, metric: str, step: int) -> int:
        """Steps that a logged value stands for: those since it was last logged."""
        steps = step - self._seen.get(metric, 0)
        self._seen[metric] = step
        return steps

    def _look(self, name: str, value: float, step: int, args: TrainingArguments) -> None:
        """Judge one logged value."""
        metric, judge, patience = LOGGED[name]
        steps = self._steps(metric, step)
        first = self.first[name]
        wrong = judge(value, first.value if first.steps >= BASELINE else None, args)
        if first.steps < BASELINE and math.isfinite(value):
            first.add(value, steps)
        if name == "gradient" and not self.episodes[name].steps:
            steps = min(steps, 1)  # not a mean over the steps since the last log, as the others are
        self._judge(name, wrong, step, steps, patience * _reuse(args))

    def _judge(
        self,
        name: str,
        wrong: str | None,
        step: int,
        steps: int = 1,
        patience: int = 1,
        *,
        last: bool = False,
    ) -> None:
        """Count what was seen; speak or stop where it is time to."""
        action = self._action(name)
        if action == "off" or not self.episodes[name].seen(wrong is not None, steps, patience):
            return
        running = f" for {patience} steps running" if patience > 1 else ""
        key = "gradient" if name == NOT_FINITE else name
        message = f"guard {key}, step {step}: {wrong}{running}. What helps: {HELP[name]}"
        self.messages.append(message)
        if self._main and self.record:
            self.record(step, {f"guards/{key}": message})
        if action == "stop" and not last:
            raise GuardError(f"{message} To go on in such a case: 'guards: {{{key}: warn}}'.")
        if self._main:
            logger.warning("%s", message)

    def _action(self, name: str) -> str:
        if name == NOT_FINITE:
            return self.actions.get("gradient", "stop")
        return self.actions.get(name, "warn")


def _checked(name: str, action: object) -> str:
    """Return an action that exists; raises UserError."""
    if name not in NAMES:
        raise UserError(f"guards: there is no guard {name!r}{nearest(name, NAMES)}")
    if action is False:  # YAML reads a bare `off` so
        return "off"
    if not isinstance(action, str) or action not in ACTIONS:
        raise UserError(f"guards: {name} cannot be {action!r}{nearest(str(action), ACTIONS)}")
    return action


def _reuse(args: TrainingArguments) -> int:
    """Optimizer steps made on the same completions: together they say no more than one."""
    batches = (getattr(args, "steps_per_generation", None) or 1) * getattr(args, "num_iterations", 1)
    return max(1, batches // args.gradient_accumulation_steps)


def _finite(optimizer: torch.optim.Optimizer) -> bool | None:
    """Whether this rank's gradients are finite; None where it has or shows none."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
    local = [grad for grad in local if grad.numel()]
    return math.isfinite(torch.nn.utils.get_total_norm(local)) if local else None
