"""GRPOTrainer: the seams to TRL, the effect of invalid rollouts, metrics, and what a step saves."""

import ast
import inspect
import re
import sys
import time

import pandas as pd
import peft
import pytest
import torch
import trl
from transformers import Trainer

from rlkit.errors import RewardError, UserError
from rlkit.registry import load_environment
from rlkit.rollouts.types import Rollout
from rlkit.scoring import ErrorBudget
from rlkit.training.settings import check_settings
from rlkit.training.step import judge
from rlkit.training.timing import StepClock
from tests.quick import ROOT, TOY
from tests.rlkit.training.recorded_steps import Judge


@pytest.fixture
def make(make_trainer):
    """Return a function that builds a trainer whose reward fails on some calls; see `make_trainer`."""

    def make(failing=(), *, rewards=None, patience=3, **options):
        rewards = rewards or {"judge": Judge(failing)}
        return make_trainer(rewards, budget=ErrorBudget(0.2, patience), **options)

    return make


def next_tasks(trainer):
    """Return the tasks of one sampling step, as the data loader yields them."""
    return next(iter(trainer.get_train_dataloader()))


def sample_batch(trainer):
    """Return the batch of one sampling step, without training on it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    return trainer._generate_and_score_completions(next_tasks(trainer))


def saved_rollouts(trainer):
    """Return the saved rollouts of a run."""
    trainer.run_dir.flush()
    files = sorted((trainer.run_dir.path / "rollouts").glob("*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


# Methods of TRL's GRPOTrainer that rlkit overrides or calls, with the parameters that it relies on.
SEAMS = {
    "_generate_and_score_completions": ["inputs"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_prepare_inputs": ["generation_batch"],
    "_get_train_sampler": ["dataset"],
    "_get_per_token_logps_and_entropies": [
        *("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy")
    ],
}
ATTRIBUTES = {
    "_buffered_inputs": "the micro-batches of a generation",
    "_logs": "the rollouts of `log_completions`",
    "_metrics": "the values since the last log",
    "_step": "the number of micro-batches so far",
    "_tokenizer": "the tokenizer, of a processor too",
}


@pytest.mark.parametrize("name", SEAMS)
def test_trl_still_has_the_method(name):
    method = getattr(trl.GRPOTrainer, name, None)
    assert method is not None, f"TRL has moved GRPOTrainer.{name}, which rlkit.training.grpo needs"
    parameters = list(inspect.signature(method).parameters)[1:]
    assert parameters[: len(SEAMS[name])] == SEAMS[name], f"TRL has changed the parameters of {name}"


# _generate_single_turn is called by rlkit, not by TRL.
@pytest.mark.parametrize("name", sorted(SEAMS.keys() - {"_generate_single_turn"}))
def test_trl_still_calls_the_method(name):
    calls = {"_get_train_sampler": "sampler_fn=self._get_train_sampler"}
    source = inspect.getsource(sys.modules[trl.GRPOTrainer.__module__])
    assert calls.get(name, f"self.{name}(") in source, (
        f"TRL no longer calls GRPOTrainer.{name}: rlkit.training.grpo has no effect on it"
    )


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_trl_still_sets_the_attribute(name):
    source = inspect.getsource(trl.GRPOTrainer.__init__)
    assert f"self.{name} = " in source, (
        f"TRL has moved GRPOTrainer.{name}, {ATTRIBUTES[name]}: see rlkit.training.grpo"
    )


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ('inputs["advantages"]', "the advantages of the batch"),
        ('inputs["completion_mask"]', "the mask of the batch"),
        ('"tool_mask"', "the mask of the tokens that an environment wrote"),
        ('inputs.get("old_per_token_logps")', "the log-probabilities of the policy that sampled"),
        ('inputs["ref_per_token_logps"]', "the log-probabilities of the reference"),
        ('inputs["importance_sampling_ratio"]', "the correction for the sampler"),
        ('inputs["num_items_in_batch"]', "the number of tokens that the loss is divided by"),
    ],
)
def test_trl_loss_still_reads_the_batch_by_these_names(text, meaning):
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    assert text in source, f"TRL's loss reads {meaning} under another name: see rlkit.training.step"


def private_names(path):
    """Return the names with one leading underscore that a module reads from objects or defines."""
    tree = ast.parse(path.read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {name for name in read | defined if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize(
    ("trainer", "module"), [(trl.GRPOTrainer, "grpo.py"), (trl.SFTTrainer, "sft.py"), (Trainer, "resume.py")]
)
def test_private_names_of_a_trainer_are_used_in_one_module(trainer, module):
    """grpo.py and sft.py may share names: both TRL's GRPOTrainer and its SFTTrainer have a `_metrics`."""
    pairs = re.findall(r"self\.(_[a-z]\w*)|def (_[a-z]\w*)", inspect.getsource(trainer))
    private = {name for pair in pairs for name in pair if name}
    if trainer is Trainer:  # names that TRL's trainer uses, too, are checked for that one
        private -= set(re.findall(r"_[a-z]\w*", inspect.getsource(trl.GRPOTrainer)))
    files = {path.name: path for path in (ROOT / "rlkit/training").rglob("*.py")}
    uses = {name: private_names(path) & private for name, path in files.items()}
    allowed = {"grpo.py": {"sft.py"}, "sft.py": {"grpo.py"}, "resume.py": set()}[module]
    assert uses[module]
    assert {name: used for name, used in uses.items() if used and name not in {module, *allowed}} == {}


def test_invalid_rollout_is_masked_and_excluded_from_the_baseline(make):
    trainer = make(failing={1})
    output = sample_batch(trainer)
    mask, advantages = output["completion_mask"], output["advantages"]
    assert mask[1].sum() == 0
    assert (mask.sum(1) > 0).tolist() == [True, False] + [True] * 6
    assert output["num_items_in_batch"] == mask.sum()
    assert advantages[1] == 0
    # The rewards of the first group are 0, NaN, 2, 0: the baseline is the mean of three.
    valid = torch.tensor([0.0, 2.0, 0.0])
    expected = (valid - valid.mean()) / (valid.std() + 1e-4)
    torch.testing.assert_close(advantages[[0, 2, 3]], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("failing", [{1}, {0, 1, 2, 3, 6}])
def test_tokens_of_invalid_rollouts_do_not_change_the_gradient(make, shared_prefix, failing):
    """Compare with the formula, computed by a plain forward pass of the valid rows only."""
    trainer = make(failing=failing, shared_prefix=shared_prefix)
    output = sample_batch(trainer)
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, output).backward()
    actual = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    valid = [i for i in range(8) if i not in failing]
    ids, mask = (
        torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], 1)[valid]
        for name in ("ids", "mask")
    )
    length = output["completion_ids"].size(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    trainer.model.zero_grad()
    logits = trainer.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[
        :, -length - 1 : -1
    ]
    chosen = logits.log_softmax(-1).gather(2, ids[:, -length:, None]).squeeze(2)
    weights = output["advantages"][valid, None] * mask[:, -length:]
    (-(chosen * weights).sum() / mask[:, -length:].sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert expected.norm() > 0
    assert (actual - expected).norm() < 1e-4 * expected.norm()


def test_batch_without_a_valid_rollout_does_not_change_the_weights(make):
    trainer = make(failing=set(range(8)))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(RewardError, match=r"all 8 rollouts of this run are invalid.*the judge is down"):
        trainer.train()
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_shared_prefix_does_not_change_the_trained_weights(make):
    weights = []
    for shared_prefix in (True, False):
        torch.manual_seed(0)
        trainer = make(shared_prefix=shared_prefix, max_steps=2, beta=0.1, seed=1)
        assert trainer.shared_prefix is shared_prefix
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    moved = (weights[0] - torch.cat([p.flatten() for p in make().model.parameters()])).norm()
    assert moved > 0.01
    # Adam amplifies the rounding of small gradients.
    assert (weights[0] - weights[1]).norm() < 0.02 * moved


def test_model_with_sliding_window_trains_without_shared_prefix(make, tiny_model, caplog):
    trainer = make(model=tiny_model("mistral"))
    assert [r.levelname for r in caplog.records if "shared_prefix is off" in r.message] == ["WARNING"]
    trainer.train()
    assert trainer.state.global_step == 1
    assert not trainer.shared_prefix


def test_log_probabilities_are_computed_in_chunks_of_the_batch_size(make):
    """If a generation lasts for several steps, it is scored one batch at a time, to bound the memory."""
    trainer = make(steps_per_generation=2, per_device_train_batch_size=4)
    row_lengths = []
    trainer.model.model.layers[0].register_forward_pre_hook(
        lambda _, args: row_lengths.append(args[0].size(1))
    )
    output = sample_batch(trainer)
    ids, mask = (
        torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], 1) for name in ("ids", "mask")
    )
    length = output["completion_ids"].size(1)
    with torch.no_grad():
        at_once = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)[0]
        row_lengths.clear()
        in_chunks = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, 4)[0]
    # Each chunk, four completions and their prompt, is one long row without padding.
    prompt_lengths = output["prompt_mask"].sum(1) - 1
    assert row_lengths == [int(mask[i : i + 4, -length:].sum() + prompt_lengths[i]) for i in (0, 4)]
    torch.testing.assert_close(in_chunks, at_once, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output["old_per_token_logps"], at_once, rtol=1e-4, atol=1e-5)


def test_reward_metrics_ignore_invalid_rollouts(make):
    trainer = make(failing={1})
    trainer.train()
    logs = {key: value for line in trainer.state.log_history for key, value in line.items()}
    values = [0.0, 2.0, 0.0, 1.0, 2.0, 0.0, 1.0]
    assert logs["rewards/judge/mean"] == pytest.approx(sum(values) / 7)
    assert logs["rewards/judge/std"] == pytest.approx(pd.Series(values).std())
    assert logs["rewards/judge/error_rate"] == pytest.approx(1 / 8)
    assert logs["reward"] == pytest.approx(sum(values) / 7)


def test_rewards_that_always_fail_stop_the_run(make):
    letters = load_environment(f"{TOY}:Letters")
    trainer = make(rewards={"broken": letters.rewards["broken"]}, max_steps=9)
    with trainer.runner, pytest.raises(RewardError, match="the judge is down"):
        trainer.train()
    assert trainer.state.global_step == 2  # the third batch is not trained on


def test_rollouts_are_saved(make, tiny_tokenizer):
    trainer = make(failing={1}, max_steps=2)
    trainer.train()
    frame = saved_rollouts(trainer)
    assert frame["step"].tolist() == [1] * 8 + [2] * 8
    assert {"task_id", "prompt", "completion", "answer", "length", "truncated", "vowel"} <= set(frame)
    assert frame["invalid"].notna().tolist() == [False, True] + [False] * 14
    assert "the judge is down" in frame["invalid"][1]
    assert frame.loc[frame["invalid"].isna(), "reward"].tolist()[:7] == [0, 2, 0, 1, 2, 0, 1]
    assert pd.isna(frame["reward"][1]) and frame["advantage"][1] == 0
    assert (frame["rewards/judge"].dropna() == frame["reward"].dropna()).all()
    for _, row in frame.iterrows():
        assert row["prompt"].startswith("Say " + row["answer"][0])
        assert row["task_id"].endswith(row["answer"][0])
        assert 1 <= row["length"] <= 5 and (row["length"] == 5 or not row["truncated"])


def test_all_generations_of_an_optimizer_step_are_saved(make):
    """With gradient_accumulation_steps > steps_per_generation an optimizer step has several generations."""
    trainer = make(steps_per_generation=1, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    assert saved_rollouts(trainer)["step"].tolist() == [1] * 16 + [2] * 16


def test_generation_for_several_steps_is_saved_once(make):
    trainer = make(steps_per_generation=2, per_device_train_batch_size=4, max_steps=4)
    trainer.train()
    assert saved_rollouts(trainer)["step"].tolist() == [1] * 8 + [3] * 8


def test_adaptive_environment_gets_step_and_mean_score(make):
    rising = load_environment(f"{TOY}:Rising")
    options = {"rewards": {"even": Judge(failing={0})}, "environment": rising, "patience": 9}
    trainer = make(**options, steps_per_generation=2, per_device_train_batch_size=4, max_steps=4)
    trainer.train()
    assert [(step, steps) for step, steps, _ in rising.progress] == [(1, 2), (2, 2), (3, 2)]
    before, first_score, second_score = (score for _, _, score in rising.progress)
    assert before is None
    valid = [float(i % 3) for i in range(1, 8)]  # the first rollout is invalid
    assert first_score == pytest.approx(sum(valid) / 7)
    assert second_score == pytest.approx(sum(float(i % 3) for i in range(8, 16)) / 8)
    logged = [row["environment/level"] for row in trainer.state.log_history if "environment/level" in row]
    assert logged == pytest.approx([0.5, 0.5 + 1 + first_score])
    assert trainer.stateful()["environment"] is rising


@pytest.mark.parametrize(
    ("keys", "num_sampling_steps"),
    [
        ({"max_steps": 3}, 3),
        ({"max_steps": 2, "steps_per_generation": 1, "gradient_accumulation_steps": 2}, 4),
        ({"max_steps": 5, "steps_per_generation": 2, "per_device_train_batch_size": 4}, 3),
        ({"max_steps": 4, "num_iterations": 2}, 2),
        ({"max_steps": 3, "num_iterations": 2}, 2),
        # An epoch of three sampling steps is two optimizer steps, of two micro-batches and of one.
        ({"max_steps": 4, "steps_per_generation": 1, "gradient_accumulation_steps": 2, "tasks": 6}, 6),
    ],
)
def test_last_sampling_step_is_at_the_end_of_the_curriculum(make, keys, num_sampling_steps):
    rising = load_environment(f"{TOY}:Rising")
    tasks = rising.tasks("train", keys.pop("tasks", 26))
    trainer = make(environment=rising, rewards={"even": Judge()}, train_dataset=tasks, **keys)
    trainer.train()
    expected = [(i, num_sampling_steps) for i in range(1, num_sampling_steps + 2)]
    assert [(step, steps) for step, steps, _ in rising.progress] == expected
    assert len(saved_rollouts(trainer)) == 8 * num_sampling_steps


def test_curriculum_continues_at_its_fraction_if_the_batch_layout_changes(make):
    trainer = make(max_steps=6, steps_per_generation=2, per_device_train_batch_size=4)
    trainer.state.max_steps = 6
    position = trainer.stateful()["progress"]
    saved = {"step": 12, "generation": 4, "buffered": None, "shape": "another"}
    for step, sampling_step in ((2, 2), (3, 3), (4, 3), (5, 4)):
        trainer.state.global_step = step
        position.load_state_dict(saved)
        assert trainer.sampling_progress == (sampling_step, 3)


class Ranking(Judge):
    def __call__(self, group) -> list[float]:
        return [float(i) for i, _ in enumerate(group)]


def test_group_reward_requires_whole_groups_on_each_process(make):
    """TRL shards rollouts over processes without regard to groups."""
    trainer = make(rewards={"best": Ranking()})
    trainer.args.per_device_train_batch_size = 6
    with pytest.raises(UserError, match=r"'best' needs whole groups.*6 rollouts.*\(4\)"):
        check_settings(trainer)


def test_rewards_of_single_rollouts_work_with_split_groups(make):
    trainer = make()
    tasks = next_tasks(trainer)[:6]
    trainer.model.train()
    ids = [5, 2]
    judged = judge(trainer, tasks, [Rollout.single("a", ids, False) for _ in tasks])
    assert judged.rewards_NR.flatten().tolist() == [0, 1, 2, 0, 1, 2]


def test_rollout_without_a_weighted_reward_gets_no_advantage_even_if_the_metric_applies(make):
    rewards = {"sometimes": Sometimes(), "metric": lambda completion: 1.0}
    trainer = make(rewards=rewards, reward_weights=[1.0, 0.0])
    tasks = [row for row in trainer.train_dataset.select([0, 1]) for _ in range(4)]
    output = trainer._generate_and_score_completions(tasks)
    # The rewards are None, 1, 0, 1, …: the first rollout of each group of four has no reward.
    assert output["advantages"][[0, 4]].tolist() == [0.0, 0.0]
    assert torch.allclose(output["advantages"][1:4].sum(), torch.tensor(0.0), atol=1e-6)
    assert output["advantages"][1] > 0 > output["advantages"][2]


class Sometimes(Judge):
    """Returns None, 1, 0, 1, None, 1, 0, 1, …"""

    def __call__(self, completion: str) -> float | None:
        self.calls += 1
        return [None, 1.0, 0.0, 1.0][(self.calls - 1) % 4]


def test_seconds_of_the_parts_add_up_to_at_most_the_step(make):
    """Each second is counted in one part only."""
    trainer = make()
    start = time.perf_counter()
    trainer.train()
    elapsed = time.perf_counter() - start
    parts = [{k: v for k, v in log.items() if k.startswith("time/")} for log in trainer.state.log_history]
    parts = [log for log in parts if log]
    names = ("generation", "rewards", "scores", "forward_backward", "optimizer")
    assert all(set(log) == {f"time/{name}" for name in names} for log in parts)
    assert 0 < sum(sum(log.values()) for log in parts) < elapsed
    assert all(value >= 0 for log in parts for value in log.values())


def test_step_clock_counts_nested_parts_once(monkeypatch):
    ticks = iter([0, 1, 3, 8, 9, 12])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    clock = StepClock({})
    with clock("forward_backward"), clock("generation"), clock("sync"):
        pass
    assert clock.seconds == {"sync": 5, "generation": 3, "forward_backward": 4}


def test_rollout_that_a_limit_cuts_off_after_an_eos_token_counts_as_truncated(make):
    """TRL checks only whether the last token is EOS."""
    trainer = make(mask_truncated_completions=True)
    loop = trainer.loop

    def truncating_loop(*args, **kwargs):
        rollouts = loop(*args, **kwargs)
        for i, rollout in enumerate(rollouts):
            rollout.ids[-1], rollout.truncated = trainer.eos_token_ids[0], i == 1
        return rollouts

    trainer.loop = truncating_loop
    trainer.loop.limits, trainer.loop.template = loop.limits, loop.template
    output = sample_batch(trainer)
    assert (output["completion_mask"].sum(1) > 0).tolist() == [True, False] + [True] * 6
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [pytest.approx(1 / 8)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 3}, "use `max_completion_length`"),
        ({"temperature": 0.1}, "use the key `temperature`"),
        ({"eos_token_id": 50}, "where the loss expects no end"),
        ({"foo": 1}, "not 'foo'"),
        ({"min_new_tokens": 1000}, "must be an integer from 0 to"),
    ],
)
def test_trainer_rejects_generation_kwargs_that_the_loss_does_not_see(make, settings, message):
    with pytest.raises(UserError, match=message):
        make(generation_kwargs=settings)


def test_min_new_tokens_in_generation_kwargs_sets_the_minimum_length(make):
    trainer = make(generation_kwargs={"min_new_tokens": 3})
    assert sample_batch(trainer)["completion_mask"].sum(1).min() >= 3


def test_log_completions_shows_invalid_rollouts(make, tmp_path, capsys):
    """TRL formats rewards as numbers, and an invalid rollout has none."""
    trainer = make(failing={1}, log_completions=True)
    trainer.train()
    frame = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert len(frame) == 8 and frame["judge"].isna().tolist() == [False, True, *[False] * 6]
    assert frame["advantage"][1] == 0 and frame["completion"].map(type).eq(str).all()


def test_evaluation_by_trl_groups_by_num_generations_eval(make):
    trainer = make(num_generations_eval=2, per_device_eval_batch_size=8)
    trainer.model.eval()
    output = trainer._generate_and_score_completions(next_tasks(trainer))
    # Rewards by group: 0, 1 | 2, 0 | 1, 2 | 0, 1. One rollout of a pair is above the mean, the other below.
    assert output["advantages"].sign().tolist() == [-1, 1, 1, -1, -1, 1, -1, 1]
    assert trainer.state.num_input_tokens_seen == 0
    assert not list((trainer.run_dir.path / "rollouts").glob("*"))
    assert trainer._metrics["eval"]["reward"] == [pytest.approx(7 / 8)] and not trainer._metrics["train"]


def test_trl_reward_of_training_gets_whole_batches_state_and_loggers(make):
    def progress(completions, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
        log_metric("progress/size", len(completions))
        lengths = [len(ids) for ids in completion_ids]
        log_extra("tokens", lengths)
        mean = sum(lengths) / len(lengths)
        return [trainer_state.global_step + (n > mean) / trainer_state.max_steps for n in lengths]

    trainer = make(rewards={"progress": progress}, max_steps=2, log_completions=True)
    with trainer.runner:
        trainer.train()
    lines = [line for line in trainer.state.log_history if "progress/size" in line]
    assert [line["progress/size"] for line in lines] == [8, 8]
    assert all(line["rewards/progress/latency"] <= line["rewards/progress/latency_max"] for line in lines)
    frame = saved_rollouts(trainer)
    for step, batch in frame.groupby("step"):  # global_step counts completed steps
        num_tokens = batch["extra/tokens"].astype(int)
        assert (num_tokens - batch["length"]).between(0, 1).all()  # `length` excludes the EOS token
        expected = step - 1 + (num_tokens > num_tokens.mean()) / 2
        assert batch["rewards/progress"].tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("lora", [False, True])
def test_no_grad_leaves_gradient_checkpointing_as_it_was(make_trainer, tiny_model, lora):
    model = tiny_model("llama")
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    trainer = make_trainer({"judge": Judge(())}, model=model, gradient_checkpointing=True)
    trainer.model.gradient_checkpointing_enable()
    embeddings = trainer.model.get_input_embeddings()
    num_hooks = len(embeddings._forward_hooks)
    for _ in range(3):
        with trainer.no_grad():
            assert not trainer.model.is_gradient_checkpointing
        assert trainer.model.is_gradient_checkpointing
        assert len(embeddings._forward_hooks) == num_hooks
