"""Guards: what triggers each one and when it is silent, in short real runs or driven by logged metrics."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig

from rlkit.commands import main as cli
from rlkit.errors import GuardError, UserError
from rlkit.registry import load_environment
from rlkit.runs import guards
from rlkit.runs.guard_conditions import (
    BASELINE_STEPS,
    CONFIRM_STEPS,
    LOGGED,
    PATIENCE_STEPS,
    RANK_LOGGED,
    REWARD_GUARDS,
    REWARD_WINDOW,
)
from rlkit.runs.guards import Guards
from tests.quick import QUICK_GRPO_CONFIG, ROOT, TOY


def variety(completions, **columns):
    return [len(set(answer[0]["content"])) + i / 10 for i, answer in enumerate(completions)]


def constant(completions, **columns):
    return [1.0] * len(completions)


@pytest.fixture
def run(tmp_path, tiny_folder, tiny_tokenizer):
    """Return a function that trains with guards and returns trainer and guards.

    Other keyword arguments are those of GRPOConfig.
    """

    def run(actions=None, reward=variety, prepare=None, callback=None, **options):
        defaults = QUICK_GRPO_CONFIG | {
            "output_dir": str(tmp_path),
            "max_completion_length": 4,
            "max_steps": PATIENCE_STEPS + 2,
            "learning_rate": 1e-4,
        }
        guards_callback = Guards(actions)
        trainer = trl.GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_folder),
            reward_funcs=reward,
            args=GRPOConfig(**(defaults | options)),
            train_dataset=load_environment(f"{TOY}:Letters").tasks("train", 26),
            processing_class=tiny_tokenizer,
            callbacks=[*([callback] if callback else []), guards_callback],
        )
        if prepare:
            prepare(trainer)
        try:
            trainer.train()
        except GuardError as error:
            trainer.stopped = str(error)
        return trainer, guards_callback

    return run


class Log:
    """Call guards with logs as the trainer does; a call returns the number of messages so far."""

    def __init__(self, actions=None, record=None, begin=0, **args):
        defaults = {"fp16": False, "gradient_accumulation_steps": 1, "max_completion_length": 1000}
        self.args = SimpleNamespace(**(defaults | args))
        self.state = SimpleNamespace(global_step=begin, is_world_process_zero=True)
        self.guards = Guards(actions, record)
        self.guards.on_train_begin(self.args, self.state, None)

    def __call__(self, metric, *values, every=1):
        for value in values:
            self.state.global_step += every
            self.guards.on_log(self.args, self.state, None, logs={metric: value, "epoch": 0.1})
        return len(self.guards.messages)


# In real runs


def test_guards_report_nothing_for_a_healthy_run(run, caplog):
    trainer, guards_callback = run(max_completion_length=32, max_steps=BASELINE_STEPS + 2 * CONFIRM_STEPS)
    assert trainer.state.global_step == BASELINE_STEPS + 2 * CONFIRM_STEPS
    assert guards_callback.messages == []
    assert "guard" not in caplog.text
    logged = {key for line in trainer.state.log_history for key in line}
    in_vllm = {"sampling/sampling_logp_difference/mean"}
    assert {metric for metric, _, _ in LOGGED.values()} - in_vllm <= logged, "TRL has renamed a metric"


def test_trl_logs_the_metric_of_the_sampler_guard():
    source = Path(trl.trainer.grpo_trainer.__file__).read_text()
    assert f'["{LOGGED["sampler"][0]}"]' in source


def test_truncation_guard_warns_if_all_completions_are_truncated(run, caplog):
    _, guards_callback = run(generation_kwargs={"min_new_tokens": 4})  # no EOS token within the limit
    (message,) = guards_callback.messages
    assert message.startswith(f"guard truncation, step {PATIENCE_STEPS}: all completions were truncated")
    assert (
        "max_completion_length (4) for 20 consecutive steps. What to do: raise max_completion_length"
        in message
    )
    assert caplog.messages.count(message) == 1


def test_reward_spread_and_gradient_guards_warn_for_constant_rewards(run):
    _, guards_callback = run(reward=constant, max_completion_length=32)
    assert [message.split(":")[0] for message in guards_callback.messages] == [
        f"guard reward_spread, step {PATIENCE_STEPS}",
        f"guard gradient, step {PATIENCE_STEPS}",
    ]
    assert "exactly 0 for 20 consecutive steps" in guards_callback.messages[1]


def test_action_stop_ends_the_run(run):
    trainer, _ = run({"reward_spread": "stop"}, reward=constant, max_completion_length=32)
    assert trainer.state.global_step == PATIENCE_STEPS
    assert trainer.stopped.startswith("guard reward_spread, step 20: all completions of every group had the")
    assert trainer.stopped.endswith("set guards: {reward_spread: warn}.")


def test_entropy_guard_warns_of_a_collapse(run):
    class Sharpen(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == BASELINE_STEPS:
                with torch.no_grad():
                    model.lm_head.weight.mul_(1000)

    _, guards_callback = run(
        {"gradient": "off"}, callback=Sharpen(), max_steps=BASELINE_STEPS + CONFIRM_STEPS
    )
    (message,) = guards_callback.messages
    assert message.startswith(f"guard entropy, step {BASELINE_STEPS + CONFIRM_STEPS}: the entropy is")
    assert "exploration has ended" in message


class Weights(TrainerCallback):
    """Record the weights before each step."""

    def __init__(self):
        self.before = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))


def spoil(value, step):
    """Return a function that sets one entry of one gradient to `value` at the given step."""
    calls = []

    def hook(gradient):
        calls.append(1)
        if len(calls) == step:
            gradient = gradient.clone()
            gradient[0] = value
        return gradient

    return lambda trainer: trainer.model.model.norm.weight.register_hook(hook)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_gradient_never_reaches_the_weights(run, value, max_grad_norm):
    weights = Weights()
    trainer, guards_callback = run(
        prepare=spoil(value, 3), callback=weights, max_grad_norm=max_grad_norm, max_steps=9, logging_steps=9
    )
    assert trainer.state.global_step == 2
    assert "guard gradient, step 3: the gradient is not finite" in trainer.stopped
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert len(guards_callback.messages) == 1
    assert after.isfinite().all()
    assert torch.equal(after, weights.before[2])
    assert not torch.equal(after, weights.before[1])


def test_action_warn_skips_a_step_with_a_nonfinite_gradient(run, caplog):
    weights = Weights()
    trainer, guards_callback = run(
        {"gradient": "warn"}, prepare=spoil(math.nan, 3), callback=weights, max_steps=5
    )
    assert trainer.state.global_step == 5
    assert torch.equal(weights.before[3], weights.before[2])
    assert not torch.equal(weights.before[4], weights.before[3])
    assert len(guards_callback.messages) == 1
    assert "guard gradient, step 3" in caplog.text


def test_action_off_applies_a_nonfinite_gradient(run):
    trainer, guards_callback = run({"gradient": "off"}, prepare=spoil(math.nan, 1), max_steps=1)
    assert guards_callback.messages == []
    assert not all(p.isfinite().all() for p in trainer.model.parameters())


def test_nonfinite_gradient_on_another_rank_stops_the_run(run, monkeypatch):
    """If gradients are sharded, those of this rank may be finite; it must stop with the other ranks."""
    monkeypatch.setattr(guards, "gather_object", lambda objects: [*objects, False])
    trainer, _ = run(max_steps=3)
    assert "the gradient is not finite" in trainer.stopped
    assert trainer.state.global_step == 0


# Driven by logs


def test_logged_nonfinite_gradient_is_reported():
    """DeepSpeed steps before callbacks run, so only the log shows the gradient."""
    log = Log({"gradient": "warn"})
    assert log("grad_norm", 1.0, math.nan) == 1
    assert "the weights are ruined" in log.guards.messages[0]
    with pytest.raises(GuardError, match="step 2"):
        Log()("grad_norm", 1.0, math.inf)


def test_fp16_may_skip_some_steps():
    log = Log(fp16=True)
    assert log("grad_norm", *[math.inf] * (PATIENCE_STEPS - 1), 1.0) == 0
    assert log("grad_norm", *[math.inf] * PATIENCE_STEPS) == 1


def test_length_guard_warns_of_growth():
    log = Log()
    assert (
        log(
            "completions/mean_length", *[100.0] * BASELINE_STEPS, *[390.0] * 9, *[410.0] * (CONFIRM_STEPS - 1)
        )
        == 0
    )
    assert log("completions/mean_length", 410.0) == 1
    assert "length is 410 tokens, compared with 100 in the first steps" in log.guards.messages[0]


def test_length_guard_mentions_the_limit():
    log = Log(max_completion_length=512)
    log("completions/mean_length", *[100.0] * BASELINE_STEPS, *[500.0] * CONFIRM_STEPS)
    assert "length is 500 tokens, at the limit of 512, compared with 100" in log.guards.messages[0]


def test_length_guard_ignores_growth_of_short_answers():
    assert Log()("completions/mean_length", *[3.0] * BASELINE_STEPS, *[60.0] * 50) == 0


@pytest.mark.parametrize(
    ("first", "later", "is_reported"),
    [(0.02, 0.1, True), (0.02, 0.07, False), (0.002, 0.04, False), (0.4, 0.45, False), (0.6, 0.6, True)],
)
def test_sampler_guard_warns_if_sampler_and_trainer_diverge(first, later, is_reported):
    log = Log()
    metric = "sampling/sampling_logp_difference/mean"
    assert log(metric, *[first] * BASELINE_STEPS, *[later] * 2 * CONFIRM_STEPS) == is_reported


def test_reward_guard_warns_of_a_collapse():
    log = Log()
    assert log("reward", *[0.4, 0.6] * REWARD_WINDOW, *[0.0, 0.1] * (REWARD_WINDOW // 2)) == 1
    assert "fell from 0.5 (up to step 20) to 0.05 (up to step 30)" in log.guards.messages[0]
    assert log("reward", *[0.0] * REWARD_WINDOW * 3) == 1, "reported once"
    assert log("reward", *[0.5] * REWARD_WINDOW, *[0.0] * REWARD_WINDOW) == 2, "reported again after it rose"


def test_reward_guards_ignore_rewards_that_are_not_finite():
    log = Log()
    assert log("reward", math.nan, *[0.5] * REWARD_WINDOW, math.nan, *[0.0] * REWARD_WINDOW) == 1
    assert log.guards.reward.value == 0.25


def held_out(*evaluations, n_tasks=200, **options):
    log = Log(**options)
    for i, (accuracy, reward) in enumerate(evaluations):
        if reward is not None:
            log("reward", reward - 0.1, reward + 0.1, every=5)
        log.guards.evaluated(10 * i, accuracy, n_tasks, metric="ndcg")
    return log.guards


def test_held_out_guard_warns_if_reward_rises_while_metric_falls():
    (message,) = held_out((0.5, None), (0.6, 0.3), (0.45, 0.4), (0.4, 0.5), (0.3, 0.6)).messages
    assert message.startswith("guard held_out, step 30: held-out ndcg fell from 60.0% at step 10 to 40.0%")
    assert "the training reward rose from 0.4 to 0.5" in message


@pytest.mark.parametrize(
    "evaluations",
    [
        [(0.6, None), (0.3, 0.5)],  # too few evaluations
        [(0.6, None), (0.3, 0.5), (0.59, 0.6)],  # a single bad evaluation
        [(0.6, None), (0.55, 0.5), (0.52, 0.6)],  # within the noise
        [(0.6, None), (0.3, 0.5), (0.3, 0.4)],  # the reward falls, too
        [(0.3, None), (0.5, 0.5), (0.6, 0.6), (0.7, 0.7)],  # the metric rises
        [(0.6, None), (0.3, None), (0.2, None)],  # no reward: not an RL run
    ],
)
def test_held_out_guard_ignores_other_histories(evaluations):
    assert held_out(*evaluations).messages == []


def test_held_out_guard_allows_the_first_reward_after_the_second_evaluation():
    evaluations = [(0.6, None), (0.4, None), (0.3, 0.4), (0.3, 0.5)]
    assert held_out(*evaluations[:3]).messages == []
    assert len(held_out(*evaluations).messages) == 1


def test_held_out_guard_ignores_an_evaluation_without_scores():
    guards_callback = held_out((0.6, None), (0.4, 0.4), (0.3, 0.5))
    guards_callback.evaluated(40, math.nan, 0, metric="ndcg")
    assert len(guards_callback.evaluations) == 3


def test_held_out_margin_depends_on_the_number_of_tasks():
    evaluations = [(0.6, None), (0.5, 0.4), (0.48, 0.5)]
    assert held_out(*evaluations, n_tasks=50).messages == []
    assert len(held_out(*evaluations, n_tasks=1000).messages) == 1


def test_held_out_guard_stops_only_a_run_that_is_training():
    evaluations = [(0.6, None), (0.4, 0.4), (0.3, 0.5)]
    with pytest.raises(GuardError, match="guard held_out, step 20"):
        held_out(*evaluations, actions={"held_out": "stop"})
    finished = held_out(*evaluations[:2], actions={"held_out": "stop"})
    finished.reward.add(0.5, 10)
    finished.evaluated(20, 0.3, 200, metric="ndcg", last=True)
    assert len(finished.messages) == 1


# Episodes, means, resuming


def test_guard_reports_once_per_episode():
    log = Log()
    clipped = "completions/clipped_ratio"
    assert log(clipped, *[1.0] * (PATIENCE_STEPS - 1), 0.9) == 0  # not consecutive
    assert log(clipped, *[1.0] * 100) == 1
    assert log(clipped, *[0.9, 1.0] * 100) == 1  # oscillates around the threshold
    assert log(clipped, *[0.9] * PATIENCE_STEPS, *[1.0] * (PATIENCE_STEPS - 1)) == 1
    assert log(clipped, 1.0) == 2


def test_guard_counts_steps_not_logs():
    log = Log()
    assert log("frac_reward_zero_std", 1.0, every=10) == 0
    assert log("frac_reward_zero_std", 1.0, every=10) == 1
    assert log.state.global_step == PATIENCE_STEPS


def test_gradient_guard_counts_a_logged_zero_as_one_step():
    log = Log()
    assert log("grad_norm", 0.0, every=50) == 0
    assert log("grad_norm", 0.0, every=50) == 1


def test_baseline_counts_steps_not_logs():
    """A baseline of ten logged values, each a mean over 10 steps, would cover 100 steps."""
    log = Log()
    assert log("entropy", 2.0, *[0.05] * 2, every=10) == 1


def test_steps_on_the_same_completions_count_as_one():
    log = Log(steps_per_generation=8, num_iterations=2, gradient_accumulation_steps=4)
    assert log("completions/clipped_ratio", *[1.0] * (PATIENCE_STEPS - 1), every=4) == 0
    assert log("completions/clipped_ratio", 1.0, every=4) == 1


def test_guards_ignore_other_logs():
    log = Log()
    log("completions/clipped_ratio", *[1.0] * (PATIENCE_STEPS - 1))
    log("eval_completions/clipped_ratio", 1.0, 1.0, every=0)
    log("entropy", None, math.nan, every=0)
    summary = {"train_runtime": 3.0, "completions/clipped_ratio": 1.0, "grad_norm": math.nan}
    log.state.global_step += 1
    log.guards.on_log(log.args, log.state, None, logs=summary)
    assert log.guards.messages == []
    assert log.guards.first["entropy"].steps == 0


def test_state_dict_restores_all_counters():
    metrics = {"completions/mean_length": (100.0, 900.0), "completions/clipped_ratio": (0.5, 1.0)}
    uninterrupted, first = Log(), Log()
    for log in (uninterrupted, first):
        for metric, (good, bad) in metrics.items():
            log.state.global_step = 0
            log(metric, *[good] * BASELINE_STEPS, *[bad] * 3)
        log("reward", *[0.4, 0.6] * (REWARD_WINDOW - 3), every=0)
        log.guards.evaluated(log.state.global_step, 0.5, 100, metric="ndcg")
    second = Log(begin=first.state.global_step)
    second.guards.load_state_dict(json.loads(json.dumps(first.guards.state_dict())))
    for log in (uninterrupted, second):
        for metric, (_, bad) in metrics.items():
            log.state.global_step = BASELINE_STEPS + 3
            log(metric, *[bad] * (PATIENCE_STEPS - 3))
        log("reward", *[0.0] * 2 * REWARD_WINDOW)
    assert len(uninterrupted.guards.messages) == 3
    assert second.guards.state_dict() == uninterrupted.guards.state_dict()


def test_message_is_logged_and_recorded_on_the_main_process_only(caplog):
    lines = []
    for main in (True, False):
        log = Log(record=lambda step, line: lines.append((step, line)))
        log.guards._is_main = main
        log("frac_reward_zero_std", 1.0, every=PATIENCE_STEPS)
        assert len(log.guards.messages) == 1
    assert lines == [(PATIENCE_STEPS, {"guards/reward_spread": log.guards.messages[0]})]
    assert caplog.messages == [log.guards.messages[0]]


@pytest.mark.parametrize("action", ["off", False])  # YAML reads a bare `off` as False
def test_action_off_disables_a_guard(action):
    assert Log({"truncation": action})("completions/clipped_ratio", 1.0, every=100) == 0


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ({"lenght": "warn"}, r"no guard 'lenght' \(did you mean 'length'\?\)"),
        ({"not_finite": "warn"}, "no guard 'not_finite'"),
        ({"length": "wran"}, r"length cannot be 'wran' \(did you mean 'warn'\?\)"),
        ({"length": True}, "length cannot be True"),
    ],
)
def test_guards_reject_unknown_names_and_actions(actions, message):
    with pytest.raises(UserError, match=message):
        Guards(actions)


def test_every_guard_is_documented():
    page = (ROOT / "docs" / "guards.md").read_text()
    assert all(f"| `{name}` |" in page for name in (*LOGGED, *RANK_LOGGED, *REWARD_GUARDS))


def test_run_command_prints_the_message_of_a_guard(capsys):
    def command():
        raise GuardError("guard length, step 3: too long.")

    assert cli.run_command(command) == 1
    assert capsys.readouterr().err.startswith(
        "rlkit: guard length, step 3: too long.\nThe checkpoints are kept"
    )
