"""GRPO with rewards that fail: what an invalid rollout may touch, and what a step leaves behind."""

import ast
import inspect
import re
import sys
import time

import pandas as pd
import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, Trainer
from trl import GRPOConfig

from rlkit.errors import RewardError, UserError
from rlkit.registry import load_environment
from rlkit.rollouts.types import Rollout
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.grpo import GRPOTrainer
from rlkit.training.step import judge
from rlkit.training.timing import StepClock
from tests.quick import ROOT, TOY
from tests.rlkit.training.recorded_steps import Judge


@pytest.fixture
def make(tmp_path, open_run, tiny_folder, tiny_model, tiny_tokenizer):
    """Return a function that makes a trainer; keywords are GRPOConfig's."""

    def make(
        failing=(), *, kind="llama", rewards=None, patience=3, shared_prefix=True, environment=None, **options
    ):
        environment = environment or load_environment(f"{TOY}:Letters")
        defaults = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 5,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
        }
        return GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_folder) if kind == "llama" else tiny_model(kind),
            args=GRPOConfig(**(defaults | options)),
            train_dataset=environment.tasks("train", 26),
            processing_class=tiny_tokenizer,
            environment=environment,
            runner=RewardRunner(rewards or {"judge": Judge(failing)}),
            budget=ErrorBudget(0.2, patience),
            run=open_run(tmp_path),
            shared_prefix=shared_prefix,
        )

    return make


def batch_of(trainer):
    """The rows of one generation batch, as the data loader gives them."""
    return next(iter(trainer.get_train_dataloader()))


def scored(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    return trainer._generate_and_score_completions(batch_of(trainer))


def rollouts(trainer):
    trainer.run.flush()
    files = sorted((trainer.run.path / "rollouts").glob("*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


# Methods of TRL's GRPOTrainer that are overridden or called, with the parameters that rlkit passes or takes.
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


@pytest.mark.parametrize(
    "name", sorted(SEAMS.keys() - {"_generate_single_turn"})
)  # that one rlkit calls itself
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
def test_trl_still_reads_the_batch_by_these_names(text, meaning):
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    assert text in source, f"TRL's loss reads {meaning} under another name: see rlkit.training.step"


def private_names(path):
    """Names with one underscore that a module reads from objects, or defines in a class."""
    tree = ast.parse(path.read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {name for name in read | defined if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize(
    ("trainer", "module"), [(trl.GRPOTrainer, "grpo.py"), (trl.SFTTrainer, "sft.py"), (Trainer, "resume.py")]
)
def test_private_names_of_a_trainer_are_used_in_one_module(trainer, module):
    """`_metrics` is a name of two classes of TRL: each has its module."""
    pairs = re.findall(r"self\.(_[a-z]\w*)|def (_[a-z]\w*)", inspect.getsource(trainer))
    theirs = {name for pair in pairs for name in pair if name}
    if trainer is Trainer:  # what TRL's classes take over is theirs
        theirs -= set(re.findall(r"_[a-z]\w*", inspect.getsource(trl.GRPOTrainer)))
    files = {path.name: path for path in (ROOT / "rlkit/training").rglob("*.py")}
    users = {name: private_names(path) & theirs for name, path in files.items()}
    own = {"grpo.py": {"sft.py"}, "sft.py": {"grpo.py"}, "resume.py": set()}[module]
    assert users[module]
    assert {name: found for name, found in users.items() if found and name not in {module, *own}} == {}


def test_an_invalid_rollout_is_left_out(make):
    trainer = make(failing={1})
    output = scored(trainer)
    mask, advantages = output["completion_mask"], output["advantages"]
    assert mask[1].sum() == 0
    assert (mask.sum(1) > 0).tolist() == [True, False] + [True] * 6
    assert output["num_items_in_batch"] == mask.sum()
    assert advantages[1] == 0
    # The rewards of the first group are 0, -, 2, 0: the baseline is the mean of three.
    valid = torch.tensor([0.0, 2.0, 0.0])
    expected = (valid - valid.mean()) / (valid.std() + 1e-4)
    torch.testing.assert_close(advantages[[0, 2, 3]], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("failing", [{1}, {0, 1, 2, 3, 6}])
def test_its_tokens_have_no_part_in_the_gradient(make, shared_prefix, failing):
    """Against the formula written out, on a plain forward of the valid rows alone."""
    trainer = make(failing=failing, shared_prefix=shared_prefix)
    output = scored(trainer)
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, output).backward()
    found = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

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
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_a_batch_without_a_valid_rollout_does_not_move_the_model(make):
    trainer = make(failing=set(range(8)))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_shared_prefix_trains_the_same_model(make):
    weights = []
    for shared_prefix in (True, False):
        torch.manual_seed(0)
        trainer = make(shared_prefix=shared_prefix, max_steps=2, beta=0.1, seed=1)
        assert trainer.shared_prefix is shared_prefix
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    moved = (weights[0] - torch.cat([p.flatten() for p in make().model.parameters()])).norm()
    assert moved > 0.01
    assert (
        weights[0] - weights[1]
    ).norm() < 0.02 * moved  # Adam amplifies the float noise of small gradients


def test_a_model_with_a_sliding_window_falls_back(make, caplog):
    trainer = make(kind="mistral")
    assert [r.levelname for r in caplog.records if "shared_prefix is off" in r.message] == ["WARNING"]
    trainer.train()
    assert trainer.state.global_step == 1
    assert not trainer.shared_prefix


def test_log_probabilities_come_in_chunks_of_the_batch_size(make):
    """With several steps a generation TRL scores the whole of it, a batch at a time, to bound memory."""
    trainer = make(steps_per_generation=2, per_device_train_batch_size=4)
    rows = []
    trainer.model.model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].size(1)))
    output = scored(trainer)
    ids, mask = (
        torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], 1) for name in ("ids", "mask")
    )
    length = output["completion_ids"].size(1)
    with torch.no_grad():
        whole = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)[0]
        rows.clear()
        chunks = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, 4)[0]
    # Chunks of four rows and their prompt, each one long row without padding.
    prompts = output["prompt_mask"].sum(1) - 1
    assert rows == [int(mask[i : i + 4, -length:].sum() + prompts[i]) for i in (0, 4)]
    torch.testing.assert_close(chunks, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output["old_per_token_logps"], whole, rtol=1e-4, atol=1e-5)


def test_metrics(make):
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
    with trainer.runner, pytest.raises(RewardError, match="the judge is ill"):
        trainer.train()
    assert trainer.state.global_step == 2  # it is the third batch that is not trained on


def test_rollouts_are_saved(make, tiny_tokenizer):
    trainer = make(failing={1}, max_steps=2)
    trainer.train()
    frame = rollouts(trainer)
    assert frame["step"].tolist() == [1] * 8 + [2] * 8
    assert {"task_id", "prompt", "completion", "answer", "length", "truncated", "vowel"} <= set(frame)
    assert frame["invalid"].notna().tolist() == [False, True] + [False] * 14
    assert "the judge is ill" in frame["invalid"][1]
    assert frame.loc[frame["invalid"].isna(), "reward"].tolist()[:7] == [0, 2, 0, 1, 2, 0, 1]
    assert pd.isna(frame["reward"][1]) and frame["advantage"][1] == 0
    assert (frame["rewards/judge"].dropna() == frame["reward"].dropna()).all()
    for _, row in frame.iterrows():
        assert row["prompt"].startswith("Say " + row["answer"][0])
        assert row["task_id"].endswith(row["answer"][0])
        assert 1 <= row["length"] <= 5 and (row["length"] == 5 or not row["truncated"])


def test_all_generations_of_a_step_are_saved(make):
    """Two generation batches for one optimizer step: TRL allows more accumulation than steps a generation."""
    trainer = make(steps_per_generation=1, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    assert rollouts(trainer)["step"].tolist() == [1] * 16 + [2] * 16


def test_a_generation_for_several_steps_is_saved_once(make):
    trainer = make(steps_per_generation=2, per_device_train_batch_size=4, max_steps=4)
    trainer.train()
    assert rollouts(trainer)["step"].tolist() == [1] * 8 + [3] * 8


def test_an_environment_is_told_how_the_training_goes(make):
    rising = load_environment(f"{TOY}:Rising")
    options = {"rewards": {"even": Judge(failing={0})}, "environment": rising, "patience": 9}
    trainer = make(**options, steps_per_generation=2, per_device_train_batch_size=4, max_steps=4)
    trainer.train()
    (first, _, first_score), (second, steps, second_score) = rising.told
    assert (first, second, steps) == (2, 4, 4)  # the steps that the next generations are for
    valid = [float(i % 3) for i in range(1, 8)]  # the first rollout is invalid
    assert first_score == pytest.approx(sum(valid) / 7)
    assert second_score == pytest.approx(sum(float(i % 3) for i in range(8, 16)) / 8)
    logged = [row["environment/level"] for row in trainer.state.log_history if "environment/level" in row]
    assert logged == pytest.approx([0.0, 0.5 + first_score])
    assert trainer.stateful()["environment"] is rising


class Ranking(Judge):
    def __call__(self, group) -> list[float]:
        return [float(i) for i, _ in enumerate(group)]


def test_a_group_reward_needs_whole_groups(make):
    """TRL deals groups out to processes; what one of them gets need not be whole groups."""
    trainer = make(rewards={"best": Ranking()})
    trainer.args.per_device_train_batch_size = 6
    with pytest.raises(UserError, match=r"'best' judges whole groups.*6 rollouts.*\(4\)"):
        trainer._check_settings()


def test_other_rewards_do_not_mind_split_groups(make):
    trainer = make()
    rows = batch_of(trainer)[:6]
    trainer.model.train()
    ids = [5, 2]
    judged = judge(trainer, rows, [Rollout.single("a", ids, False) for _ in rows])
    assert judged.rewards.flatten().tolist() == [0, 1, 2, 0, 1, 2]


def test_a_rollout_that_no_weighted_reward_applies_to_is_left_out_though_the_metric_judges_it(make):
    rewards = {"sometimes": Sometimes(), "metric": lambda completion: 1.0}
    trainer = make(rewards=rewards, reward_weights=[1.0, 0.0])
    inputs = [row for row in trainer.train_dataset.select([0, 1]) for _ in range(4)]
    output = trainer._generate_and_score_completions(inputs)
    # The judge says None, 1, 0, 1, ...: the first of each group of four has no reward.
    assert output["advantages"][[0, 4]].tolist() == [0.0, 0.0]
    assert torch.allclose(output["advantages"][1:4].sum(), torch.tensor(0.0), atol=1e-6)
    assert output["advantages"][1] > 0 > output["advantages"][2]


class Sometimes(Judge):
    """None, 1, 0, 1, None, 1, 0, 1, …"""

    def __call__(self, completion: str) -> float | None:
        self.calls += 1
        return [None, 1.0, 0.0, 1.0][(self.calls - 1) % 4]


def test_the_seconds_of_a_step_add_up(make):
    """Every part is counted once: together they are no more than the step took."""
    trainer = make()
    started = time.perf_counter()
    trainer.train()
    took = time.perf_counter() - started
    parts = [{k: v for k, v in log.items() if k.startswith("time/")} for log in trainer.state.log_history]
    parts = [log for log in parts if log]
    names = ("generation", "rewards", "scores", "forward_backward", "optimizer")
    assert all(set(log) == {f"time/{name}" for name in names} for log in parts)
    assert 0 < sum(sum(log.values()) for log in parts) < took
    assert all(value >= 0 for log in parts for value in log.values())


def test_a_part_within_a_part_is_counted_once(monkeypatch):
    ticks = iter([0, 1, 3, 8, 9, 12])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    clock = StepClock({})
    with clock("forward_backward"), clock("generation"), clock("sync"):
        pass
    assert clock.seconds == {"sync": 5, "generation": 3, "forward_backward": 4}


def test_a_rollout_that_a_limit_cut_after_an_end_token_counts_as_truncated(make):
    """TRL looks at the last token alone."""
    trainer = make(mask_truncated_completions=True)
    loop = trainer.loop

    def cut(*args, **kwargs):
        rollouts = loop(*args, **kwargs)
        for i, rollout in enumerate(rollouts):
            rollout.ids[-1], rollout.truncated = trainer.eos_token_ids[0], i == 1
        return rollouts

    trainer.loop = cut
    trainer.loop.limits, trainer.loop.template = loop.limits, loop.template
    output = scored(trainer)
    assert (output["completion_mask"].sum(1) > 0).tolist() == [True, False] + [True] * 6
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [pytest.approx(1 / 8)]


def test_what_limits_a_completion_is_refused_among_the_further_keys(make):
    with pytest.raises(UserError, match="max_completion_length"):
        make(generation_kwargs={"max_new_tokens": 3})


def test_log_completions_shows_rollouts_that_no_reward_applies_to(make, tmp_path, capsys):
    """TRL prints rewards as numbers; an invalid rollout has none."""
    trainer = make(failing={1}, log_completions=True)
    trainer.train()
    frame = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert len(frame) == 8 and frame["judge"].isna().tolist() == [False, True, *[False] * 6]
    assert frame["advantage"][1] == 0 and frame["completion"].map(type).eq(str).all()


def test_an_evaluation_by_trl_groups_by_its_own_number_of_generations(make):
    trainer = make(num_generations_eval=2, per_device_eval_batch_size=8)
    trainer.model.eval()
    rows = batch_of(trainer)
    output = trainer._generate_and_score_completions(rows)
    # 0, 1 | 2, 0 | 1, 2 | 0, 1: the first of a pair is below the mean where the second is above it.
    assert output["advantages"].sign().tolist() == [-1, 1, 1, -1, -1, 1, -1, 1]
    assert trainer.state.num_input_tokens_seen == 0
    assert not list((trainer.run.path / "rollouts").glob("*"))
    assert trainer._metrics["eval"]["reward"] == [pytest.approx(7 / 8)] and not trainer._metrics["train"]
