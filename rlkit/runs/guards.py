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

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "stop", "off")

# Consecutive steps without a learning signal. A batch of hard tasks can cause one such step, but not twenty.
PATIENCE_STEPS = 20
# Consecutive steps beyond a threshold. Metrics of single steps are noisy; the changes to detect are lasting.
CONFIRM_STEPS = 5
# Number of first steps whose mean is the baseline. With more, it would include the change to detect.
BASELINE_STEPS = 10
# Entropy falls in every run that learns, to a half or a fifth. At a twentieth, all answers are alike.
MIN_ENTROPY_RATIO = 0.05
# Reasoning lengthens answers over hundreds of steps. Growth from 3 to 12 tokens does not deserve a warning.
MAX_LENGTH_RATIO = 4.0
MIN_BASELINE_LENGTH = 16  # tokens; a shorter baseline counts as this long
AT_LIMIT_RATIO = 0.9  # of max_completion_length: with a mean this long most answers are truncated
# In nats per token. Between vLLM and the trainer, 0.01 to 0.02 are typical in bfloat16. Gaps below the
# minimum hardly affect the importance weights. Above the maximum, a token's importance ratio is off by a
# factor of e^0.5 = 1.65, so the baseline no longer matters.
MAX_SAMPLER_GAP_RATIO = 4.0
MIN_SAMPLER_GAP = 0.05
MAX_SAMPLER_GAP = 0.5
MIN_SCORE_SPREAD = 1e-4  # standard deviation; scores are similarities divided by a temperature far below 1
# Standard errors of the difference between two accuracies, computed as if on independent tasks. The tasks are
# the same, so the real noise is smaller. In addition, two evaluations must agree.
HELD_OUT_STANDARD_ERRORS = 2.0

Judge = Callable[[float, float | None, TrainingArguments], str | None]


def _truncation(value: float, first: float | None, args: TrainingArguments) -> str | None:
    limit = getattr(args, "max_completion_length", None)
    return f"all completions were truncated at max_completion_length ({limit})" if value >= 1 else None


def _reward_spread(value: float, first: float | None, args: TrainingArguments) -> str | None:
    return "all completions of every group had the same reward" if value >= 1 else None


def _gradient(value: float, first: float | None, args: TrainingArguments) -> str | None:
    if value == 0:
        return "the logged gradient was exactly 0"
    # With fp16 this is normal for a few steps: the loss scaler skips them to find the right scale.
    return None if math.isfinite(value) else "the logged gradient was not finite"


def _entropy(value: float, first: float | None, args: TrainingArguments) -> str | None:
    if first is None or value >= MIN_ENTROPY_RATIO * first:
        return None
    return (
        f"the entropy is {value:.2g} nats per token, {value / first:.1%} of its mean of {first:.2g} in the "
        "first steps"
    )


def _length(value: float, first: float | None, args: TrainingArguments) -> str | None:
    if first is None or value <= MAX_LENGTH_RATIO * max(first, MIN_BASELINE_LENGTH):
        return None
    limit = getattr(args, "max_completion_length", None)
    at_limit = f", at the limit of {limit}" if limit and value >= AT_LIMIT_RATIO * limit else ""
    length = f"the mean completion length is {value:.0f} tokens{at_limit}"
    return f"{length}, compared with {first:.0f} in the first steps"


def _sampler(value: float, first: float | None, args: TrainingArguments) -> str | None:
    max_gap = MAX_SAMPLER_GAP
    if first is not None:
        max_gap = min(max_gap, max(MAX_SAMPLER_GAP_RATIO * first, MIN_SAMPLER_GAP))
    if value <= max_gap:
        return None
    baseline = "" if first is None else f", compared with {first:.2g} in the first steps"
    return f"log-probabilities of sampler and trainer differ by {value:.2g} nats per token{baseline}"


# Guards by name: the logged metric, the function that returns a problem or None, and the number of
# consecutive steps with the problem before the guard reports it.
LOGGED: dict[str, tuple[str, Judge, int]] = {
    "truncation": ("completions/clipped_ratio", _truncation, PATIENCE_STEPS),
    "reward_spread": ("frac_reward_zero_std", _reward_spread, PATIENCE_STEPS),
    "gradient": ("grad_norm", _gradient, PATIENCE_STEPS),
    "entropy": ("entropy", _entropy, CONFIRM_STEPS),
    "length": ("completions/mean_length", _length, CONFIRM_STEPS),
    "sampler": ("sampling/sampling_logp_difference/mean", _sampler, CONFIRM_STEPS),
}


def _utility_spread(value: float, first: float | None, args: TrainingArguments) -> str | None:
    return "all rankings drawn for a query had the same utility" if value == 0 else None


def _score_spread(value: float, first: float | None, args: TrainingArguments) -> str | None:
    return "all candidates of a query had the same score" if value <= MIN_SCORE_SPREAD else None


# Guards of `rlkit rank`. A batch has many queries, so that a few steps without a gradient are enough.
RANK_LOGGED: dict[str, tuple[str, Judge, int]] = {
    "utility_spread": ("utility_spread", _utility_spread, CONFIRM_STEPS),
    "score_spread": ("score_spread", _score_spread, CONFIRM_STEPS),
    "gradient": ("grad_norm", _gradient, CONFIRM_STEPS),
}
SFT_LOGGED = {"gradient": LOGGED["gradient"]}
NAMES = (*dict.fromkeys((*LOGGED, *RANK_LOGGED)), "held_out")
NOT_FINITE = "not_finite"  # the second condition of the guard `gradient`, with its own default action
HELP = {
    "truncation": "raise max_completion_length, prompt for shorter answers, or fine-tune first so that the "
    "model learns to stop (rlkit sft).",
    "reward_spread": "such groups give no learning signal; use easier or mixed tasks, fine-tune first "
    "(rlkit sft), raise num_generations, or use a reward that distinguishes the answers.",
    "utility_spread": "such steps have no gradient; use more candidates or harder ones, a higher cutoff or "
    "temperature, or the measure rr if one relevant document is first in every ranking.",
    "score_spread": "the encoder has collapsed or the temperature is too high; lower learning_rate or "
    "temperature, and check that the prompts leave room for the strings (max_seq_length).",
    "gradient": "such steps do not change the weights; check whether rewards differ within groups (rank: "
    "utilities between the rankings of a query; sft: whether the demonstrations have tokens to train on), "
    "whether all completions are truncated and masked, and whether any weights are trainable.",
    NOT_FINITE: "in the first step, check the model's files; later, resume from the last checkpoint with a "
    "lower learning_rate, use bf16 instead of fp16, and check the rewards and completions (sft: the "
    "demonstrations) of this step.",
    "entropy": "answers are nearly identical, so exploration has ended; lower learning_rate, or raise "
    "epsilon_high, temperature or beta; or stop the run if the held-out results are good.",
    "length": "check whether longer answers earn more reward; use loss_type dr_grpo, a length reward or a "
    "lower max_completion_length.",
    "sampler": "check that new weights reach the sampler, and that sampler and trainer use the same dtype, "
    "temperature and chat template; lower steps_per_generation to reduce staleness.",
    "held_out": "the model is overfitting to the reward instead of learning the task; read rollouts with "
    "high rewards, fix the reward, raise beta, use more tasks, or keep an earlier checkpoint.",
}


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


@dataclass
class HeldOut:
    """One evaluation on held-out tasks.

    Attributes:
        step: Number of optimizer steps before it.
        accuracy: Mean of the metric over the tasks.
        n_tasks: Number of tasks with a score.
        reward: Mean training reward since the previous evaluation, or None if none was logged.
    """

    step: int
    accuracy: float
    n_tasks: int
    reward: float | None


def overfitting(evaluations: list[HeldOut], metric: str) -> str | None:
    """Return a message if the training reward rose while the held-out metric fell, else None.

    The metric has fallen if the last two evaluations are below the best one by more than
    `HELD_OUT_STANDARD_ERRORS` standard errors. The reward has risen if the last logged value is above the
    first one after the best evaluation.
    """
    best_index = max(range(len(evaluations)), key=lambda i: (evaluations[i].accuracy, i))
    if best_index > len(evaluations) - 3:
        return None
    best, last = evaluations[best_index], evaluations[-1]
    # With evaluation_steps equal to logging_steps, the first log comes after the second evaluation.
    rewards = [e.reward for e in evaluations[best_index + 1 :] if e.reward is not None]
    if len(rewards) < 2 or rewards[-1] <= rewards[0]:
        return None
    for evaluation in evaluations[-2:]:
        error = math.hypot(_standard_error(best), _standard_error(evaluation))
        if best.accuracy - evaluation.accuracy <= HELD_OUT_STANDARD_ERRORS * error:
            return None
    return (
        f"held-out {metric} fell from {best.accuracy:.1%} at step {best.step} to {last.accuracy:.1%} while "
        f"the training reward rose from {rewards[0]:.3g} to {rewards[-1]:.3g}"
    )


def _standard_error(evaluation: HeldOut) -> float:
    """Return the binomial standard error, smoothed by one success and one failure so that it is never 0."""
    n = evaluation.n_tasks
    rate = (evaluation.accuracy * n + 1) / (n + 2)
    return math.sqrt(rate * (1 - rate) / n)


class Guards(TrainerCallback):
    """Trainer callback with all guards.

    Add it after the callback that writes metrics, so that those of the step that a guard stops are saved.

    Args:
        actions: "warn", "stop" or "off" by name of the guard. The default is "warn", except that a gradient
            that is not finite stops the run. With "gradient: warn", a step with such a gradient is skipped.
        record: Function that saves a message, such as `RunDirectory.log`. It is called on the main process
            with the step and `{"guards/<name>": message}`.
        logged: Guards that read a logged metric: `LOGGED`, `RANK_LOGGED` or `SFT_LOGGED`.
        reward: Logged metric that training maximizes; None if there is none, and no guard `held_out`.

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
        names = (*logged, "held_out") if reward else (*logged,)
        self.actions = {name: _check_action(name, action, names) for name, action in (actions or {}).items()}
        self.record = record
        self.messages: list[str] = []
        self.episodes = {name: Episode() for name in (*names, NOT_FINITE)}
        self.first = {name: Mean() for name in logged}
        self.evaluations: list[HeldOut] = []
        self.reward = Mean()  # since the last evaluation
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
            self.reward.add(reward, self._steps_since_log(self.reward_metric, step))
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
            "messages": list(self.messages),
            "seen": dict(self._last_steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`. The actions are not part of it."""
        self.episodes |= {name: Episode(**values) for name, values in state["episodes"].items()}
        self.first |= {name: Mean(**values) for name, values in state["first"].items()}
        self.evaluations = [HeldOut(**values) for values in state["evaluations"]]
        self.reward = Mean(**state["reward"])
        self.messages = list(state["messages"])
        self._last_steps = dict(state["seen"])

    def _steps_since_log(self, metric: str, step: int) -> int:
        """Return the number of steps since a metric was last logged, over which its value is a mean."""
        num_steps = step - self._last_steps.get(metric, 0)
        self._last_steps[metric] = step
        return num_steps

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
