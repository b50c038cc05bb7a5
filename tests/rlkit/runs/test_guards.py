"""Guards: what provokes each, in a run where that is quick; when they speak, when they keep silent."""

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
from rlkit.runs.guards import BASELINE, CONFIRM, PATIENCE, Guards
from tests.quick import ROOT, TOY

EOS = 2


def variety(completions, **columns):
    return [len(set(answer[0]["content"])) + i / 10 for i, answer in enumerate(completions)]


def constant(completions, **columns):
    return [1.0] * len(completions)


@pytest.fixture
def run(tmp_path, tiny_folder, tiny_tokenizer):
    """Return a function that trains with guards and returns trainer and guards; keywords are GRPOConfig's."""

    def run(actions=None, reward=variety, prepare=None, callback=None, **options):
        defaults = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 4,
            "max_steps": PATIENCE + 2,
            "logging_steps": 1,
            "learning_rate": 1e-4,
            "disable_tqdm": True,
        }
        watching = Guards(actions)
        trainer = trl.GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_folder),
            reward_funcs=reward,
            args=GRPOConfig(**(defaults | options)),
            train_dataset=load_environment(f"{TOY}:Letters").tasks("train", 26),
            processing_class=tiny_tokenizer,
            callbacks=[*([callback] if callback else []), watching],
        )
        if prepare:
            prepare(trainer)
        try:
            trainer.train()
        except GuardError as error:
            trainer.stopped = str(error)
        return trainer, watching

    return run


class Log:
    """Drives guards with logs, as the trainer would."""

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


def test_a_healthy_run_says_nothing(run, caplog):
    trainer, watching = run(max_completion_length=32, max_steps=BASELINE + 2 * CONFIRM)
    assert trainer.state.global_step == BASELINE + 2 * CONFIRM
    assert watching.messages == []
    assert "guard" not in caplog.text
    logged = {key for line in trainer.state.log_history for key in line}
    in_vllm = {"sampling/sampling_logp_difference/mean"}
    assert {metric for metric, _, _ in guards.LOGGED.values()} - in_vllm <= logged, "TRL has renamed a metric"


def test_trl_still_logs_the_samplers_metric():
    source = Path(trl.trainer.grpo_trainer.__file__).read_text()
    assert f'["{guards.LOGGED["sampler"][0]}"]' in source


def test_all_completions_truncated(run, caplog):
    _, watching = run(generation_kwargs={"suppress_tokens": [EOS]})
    (message,) = watching.messages
    assert message.startswith(f"guard truncation, step {PATIENCE}: all completions were cut off")
    assert (
        "max_completion_length (4) for 20 steps running. What helps: raise max_completion_length" in message
    )
    assert caplog.messages.count(message) == 1


def test_no_reward_spread_and_hence_no_gradient(run):
    _, watching = run(reward=constant, max_completion_length=32)
    assert [message.split(":")[0] for message in watching.messages] == [
        f"guard reward_spread, step {PATIENCE}",
        f"guard gradient, step {PATIENCE}",
    ]
    assert "exactly 0 for 20 steps running" in watching.messages[1]


def test_stop_ends_the_run(run):
    trainer, _ = run({"reward_spread": "stop"}, reward=constant, max_completion_length=32)
    assert trainer.state.global_step == PATIENCE
    assert trainer.stopped.startswith("guard reward_spread, step 20: all completions of every group had the")
    assert trainer.stopped.endswith("'guards: {reward_spread: warn}'.")


def test_entropy_collapses(run):
    class Sharpen(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == BASELINE:
                with torch.no_grad():
                    model.lm_head.weight.mul_(1000)

    _, watching = run({"gradient": "off"}, callback=Sharpen(), max_steps=BASELINE + CONFIRM)
    (message,) = watching.messages
    assert message.startswith(f"guard entropy, step {BASELINE + CONFIRM}: the entropy is")
    assert "exploration is over" in message


class Weights(TrainerCallback):
    """The weights before each step."""

    def __init__(self):
        self.before = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))


def spoil(value, step):
    """Make one entry of one gradient `value` at that step."""
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
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(run, value, max_grad_norm):
    weights = Weights()
    trainer, watching = run(
        prepare=spoil(value, 3), callback=weights, max_grad_norm=max_grad_norm, max_steps=9, logging_steps=9
    )
    assert trainer.state.global_step == 2
    assert "guard gradient, step 3: the gradient is not finite" in trainer.stopped
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert len(watching.messages) == 1
    assert after.isfinite().all()
    assert torch.equal(after, weights.before[2])
    assert not torch.equal(after, weights.before[1])


def test_with_warn_the_step_is_left_out(run, caplog):
    weights = Weights()
    trainer, watching = run({"gradient": "warn"}, prepare=spoil(math.nan, 3), callback=weights, max_steps=5)
    assert trainer.state.global_step == 5
    assert torch.equal(weights.before[3], weights.before[2])
    assert not torch.equal(weights.before[4], weights.before[3])
    assert len(watching.messages) == 1
    assert "guard gradient, step 3" in caplog.text


def test_off_leaves_the_gradient_alone(run):
    trainer, watching = run({"gradient": "off"}, prepare=spoil(math.nan, 1), max_steps=1)
    assert watching.messages == []
    assert not all(p.isfinite().all() for p in trainer.model.parameters())


def test_rejected_by_another_rank(run, monkeypatch):
    """With sharded gradients a rank may hold finite ones only; it stops with the others."""
    monkeypatch.setattr(guards, "gather_object", lambda found: [*found, False])
    trainer, _ = run(max_steps=3)
    assert "the gradient is not finite" in trainer.stopped
    assert trainer.state.global_step == 0


# Driven by logs


def test_a_gradient_that_only_the_log_shows():
    """DeepSpeed makes its step before callbacks see anything."""
    log = Log({"gradient": "warn"})
    assert log("grad_norm", 1.0, math.nan) == 1
    assert "the weights are ruined" in log.guards.messages[0]
    with pytest.raises(GuardError, match="step 2"):
        Log()("grad_norm", 1.0, math.inf)


def test_loss_scaling_may_leave_out_some_steps():
    log = Log(fp16=True)
    assert log("grad_norm", *[math.inf] * (PATIENCE - 1), 1.0) == 0
    assert log("grad_norm", *[math.inf] * PATIENCE) == 1


def test_length_explodes():
    log = Log()
    assert log("completions/mean_length", *[100.0] * BASELINE, *[390.0] * 9, *[410.0] * (CONFIRM - 1)) == 0
    assert log("completions/mean_length", 410.0) == 1
    assert "completions have 410 tokens on average, in the first steps it was 100" in log.guards.messages[0]


def test_length_at_the_limit():
    log = Log(max_completion_length=512)
    log("completions/mean_length", *[100.0] * BASELINE, *[500.0] * CONFIRM)
    assert "500 tokens on average, at the limit of 512" in log.guards.messages[0]


def test_short_answers_may_grow():
    assert Log()("completions/mean_length", *[3.0] * BASELINE, *[60.0] * 50) == 0


@pytest.mark.parametrize(
    ("first", "later", "speaks"),
    [(0.02, 0.1, True), (0.02, 0.07, False), (0.002, 0.04, False), (0.4, 0.45, False), (0.6, 0.6, True)],
)
def test_sampler_and_trainer_drift_apart(first, later, speaks):
    log = Log()
    metric = "sampling/sampling_logp_difference/mean"
    assert log(metric, *[first] * BASELINE, *[later] * 2 * CONFIRM) == speaks


def held_out(*evaluations, n_tasks=200, **options):
    log = Log(**options)
    for i, (accuracy, reward) in enumerate(evaluations):
        if reward is not None:
            log("reward", reward - 0.1, reward + 0.1, every=5)
        log.guards.evaluated(10 * i, accuracy, n_tasks, metric="ndcg")
    return log.guards


def test_the_reward_rises_while_the_metric_falls():
    found = held_out((0.5, None), (0.6, 0.3), (0.45, 0.4), (0.4, 0.5), (0.3, 0.6)).messages
    assert len(found) == 1
    assert found[0].startswith("guard held_out, step 30: held-out ndcg fell from 60.0% at step 10 to 40.0%")
    assert "the training reward rose from 0.4 to 0.5" in found[0]


@pytest.mark.parametrize(
    "evaluations",
    [
        [(0.6, None), (0.3, 0.5)],  # two are too few
        [(0.6, None), (0.3, 0.5), (0.59, 0.6)],  # one bad one
        [(0.6, None), (0.55, 0.5), (0.52, 0.6)],  # less than noise
        [(0.6, None), (0.3, 0.5), (0.3, 0.4)],  # the reward falls as well
        [(0.3, None), (0.5, 0.5), (0.6, 0.6), (0.7, 0.7)],  # learning
        [(0.6, None), (0.3, None), (0.2, None)],  # no reward: not an RL run
    ],
)
def test_held_out_accuracy_that_is_no_cause(evaluations):
    assert held_out(*evaluations).messages == []


def test_the_first_reward_may_be_logged_after_the_second_evaluation():
    evaluations = [(0.6, None), (0.4, None), (0.3, 0.4), (0.3, 0.5)]
    assert held_out(*evaluations[:3]).messages == []
    assert len(held_out(*evaluations).messages) == 1


def test_an_evaluation_without_a_judged_task_is_passed_over():
    watching = held_out((0.6, None), (0.4, 0.4), (0.3, 0.5))
    watching.evaluated(40, math.nan, 0, metric="ndcg")
    assert len(watching.evaluations) == 3


def test_the_margin_is_that_of_the_number_of_tasks():
    evaluations = [(0.6, None), (0.5, 0.4), (0.48, 0.5)]
    assert held_out(*evaluations, n_tasks=50).messages == []
    assert len(held_out(*evaluations, n_tasks=1000).messages) == 1


def test_held_out_stops_but_not_a_run_that_is_over():
    evaluations = [(0.6, None), (0.4, 0.4), (0.3, 0.5)]
    with pytest.raises(GuardError, match="guard held_out, step 20"):
        held_out(*evaluations, actions={"held_out": "stop"})
    over = held_out(*evaluations[:2], actions={"held_out": "stop"})
    over.reward.add(0.5, 10)
    over.evaluated(20, 0.3, 200, metric="ndcg", last=True)
    assert len(over.messages) == 1


# Episodes, averages, resuming


def test_once_an_episode():
    log = Log()
    clipped = "completions/clipped_ratio"
    assert log(clipped, *[1.0] * (PATIENCE - 1), 0.9) == 0  # not running
    assert log(clipped, *[1.0] * 100) == 1
    assert log(clipped, *[0.9, 1.0] * 100) == 1  # swings about the threshold
    assert log(clipped, *[0.9] * PATIENCE, *[1.0] * (PATIENCE - 1)) == 1
    assert log(clipped, 1.0) == 2


def test_counts_are_in_steps():
    log = Log()
    assert log("frac_reward_zero_std", 1.0, every=10) == 0
    assert log("frac_reward_zero_std", 1.0, every=10) == 1
    assert log.state.global_step == PATIENCE


def test_a_logged_gradient_is_that_of_one_step():
    log = Log()
    assert log("grad_norm", 0.0, every=50) == 0
    assert log("grad_norm", 0.0, every=50) == 1


def test_averaged_first_steps():
    """Ten values of 10 steps each would be a hundred first steps."""
    log = Log()
    assert log("entropy", 2.0, *[0.05] * 2, every=10) == 1


def test_steps_on_the_same_completions_count_as_one():
    log = Log(steps_per_generation=8, num_iterations=2, gradient_accumulation_steps=4)
    assert log("completions/clipped_ratio", *[1.0] * (PATIENCE - 1), every=4) == 0
    assert log("completions/clipped_ratio", 1.0, every=4) == 1


def test_other_logs_are_passed_over():
    log = Log()
    log("completions/clipped_ratio", *[1.0] * (PATIENCE - 1))
    log("eval_completions/clipped_ratio", 1.0, 1.0, every=0)
    log("entropy", None, math.nan, every=0)
    summary = {"train_runtime": 3.0, "completions/clipped_ratio": 1.0, "grad_norm": math.nan}
    log.state.global_step += 1
    log.guards.on_log(log.args, log.state, None, logs=summary)
    assert log.guards.messages == []
    assert log.guards.first["entropy"].steps == 0


def test_a_resumed_run_goes_on_with_its_counts():
    metrics = {"completions/mean_length": (100.0, 900.0), "completions/clipped_ratio": (0.5, 1.0)}
    straight, first = Log(), Log()
    for log in (straight, first):
        for metric, (good, bad) in metrics.items():
            log.state.global_step = 0
            log(metric, *[good] * BASELINE, *[bad] * 3)
        log.guards.evaluated(log.state.global_step, 0.5, 100, metric="ndcg")
    second = Log(begin=first.state.global_step)
    second.guards.load_state_dict(json.loads(json.dumps(first.guards.state_dict())))
    for log in (straight, second):
        for metric, (_, bad) in metrics.items():
            log.state.global_step = BASELINE + 3
            log(metric, *[bad] * (PATIENCE - 3))
    assert len(straight.guards.messages) == 2
    assert second.guards.state_dict() == straight.guards.state_dict()


def test_what_is_said_is_recorded_on_the_main_process_only(caplog):
    lines = []
    for main in (True, False):
        log = Log(record=lambda step, line: lines.append((step, line)))
        log.guards._main = main
        log("frac_reward_zero_std", 1.0, every=PATIENCE)
        assert len(log.guards.messages) == 1
    assert lines == [(PATIENCE, {"guards/reward_spread": log.guards.messages[0]})]
    assert caplog.messages == [log.guards.messages[0]]


@pytest.mark.parametrize("action", ["off", False])  # YAML reads a bare `off` as False
def test_off(action):
    assert Log({"truncation": action})("completions/clipped_ratio", 1.0, every=100) == 0


@pytest.mark.parametrize(
    ("actions", "said"),
    [
        ({"lenght": "warn"}, r"no guard 'lenght' \(did you mean 'length'\?\)"),
        ({"not_finite": "warn"}, "no guard 'not_finite'"),
        ({"length": "wran"}, r"length cannot be 'wran' \(did you mean 'warn'\?\)"),
        ({"length": True}, "length cannot be True"),
    ],
)
def test_unknown_names_and_actions(actions, said):
    with pytest.raises(UserError, match=said):
        Guards(actions)


def test_every_guard_is_in_the_docs():
    page = (ROOT / "docs" / "guards.md").read_text()
    assert all(f"| `{name}` |" in page for name in guards.NAMES)


def test_the_command_line_says_it_in_one_message(capsys):
    def command():
        raise GuardError("guard length, step 3: too long.")

    assert cli.run_command(command) == 1
    assert capsys.readouterr().err.startswith(
        "rlkit: guard length, step 3: too long.\nThe checkpoints are kept"
    )
