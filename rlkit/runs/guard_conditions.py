"""The conditions of the guards and their thresholds, each with its reason. docs/guards.md describes them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import TrainingArguments

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
# Logged rewards whose mean is compared: enough to average out easy and hard batches.
REWARD_WINDOW = 10
# Rewards also fall for good reasons, such as harder tasks in a curriculum, but rarely by half.
MIN_REWARD_RATIO = 0.5
# Standard errors of the difference between two windows. One is the best of many, so its mean is partly luck.
# With this margin, hardly any run of 2,000 steps without a trend is reported; the tests simulate such runs.
REWARD_STANDARD_ERRORS = 5.0

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
# Guards that need a training reward; `rlkit sft` has none.
REWARD_GUARDS = ("reward", "held_out")
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
    "reward": "read rollouts from before and after the drop; start again from an earlier checkpoint with a "
    "lower learning_rate or a higher beta; ignore this if the tasks were made harder on purpose.",
    "held_out": "the model is overfitting to the reward instead of learning the task; read rollouts with "
    "high rewards, fix the reward, raise beta, use more tasks, or keep an earlier checkpoint.",
}


@dataclass
class RewardWindows:
    """Means of the training reward over consecutive windows of `REWARD_WINDOW` logged values.

    Attributes:
        rewards: Rewards of the current window.
        best_mean: Highest mean of a completed window, or None.
        best_variance: Variance of the rewards in that window.
        best_step: Step at its end.
        sum_of_variances: Sum of the variances in all completed windows.
        num_windows: Number of completed windows.
    """

    rewards: list[float] = field(default_factory=list)
    best_mean: float | None = None
    best_variance: float = 0.0
    best_step: int = 0
    sum_of_variances: float = 0.0
    num_windows: int = 0

    def complete(self, step: int) -> str | None:
        """Complete the current window, and return a message if the reward has collapsed."""
        mean, variance = statistics.fmean(self.rewards), statistics.variance(self.rewards)
        self.sum_of_variances += variance
        self.num_windows += 1
        self.rewards = []
        if self.best_mean is None or mean >= self.best_mean:
            self.best_mean, self.best_variance, self.best_step = mean, variance, step
            return None
        # Two windows alone may have a small variance by chance. All windows may have one because the reward
        # hardly varied for long, as at the beginning of a run that learns late.
        pooled = max(self.sum_of_variances / self.num_windows, (self.best_variance + variance) / 2)
        error = math.sqrt(2 * pooled / REWARD_WINDOW)
        is_low = self.best_mean > 0 and mean < MIN_REWARD_RATIO * self.best_mean
        if not is_low or self.best_mean - mean <= REWARD_STANDARD_ERRORS * error:
            return None
        return (
            f"the mean reward over {REWARD_WINDOW} logged values fell from {self.best_mean:.3g} (up to step "
            f"{self.best_step}) to {mean:.3g} (up to step {step})"
        )


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
