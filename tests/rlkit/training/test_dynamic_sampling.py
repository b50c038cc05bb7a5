"""Groups without spread are replaced by fresh ones, up to a cap, and what was sampled for it is told."""

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.grpo import GRPOTrainer
from tests.quick import TOY

G = 4


class ByGroup:
    """Rewards of whole groups in turn, in this process: "s" has spread, "a" is all alike."""

    def __init__(self, pattern):
        self.pattern = pattern
        self.calls = 0

    def __call__(self, group) -> list[float]:
        kind = self.pattern[self.calls % len(self.pattern)]
        self.calls += 1
        return [float(i % 2) if kind == "s" else 0.3 for i in range(len(group))]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.fixture
def make(tmp_path, open_run, tiny_folder, tiny_tokenizer):
    def make(pattern, attempts=4, **options):
        environment = load_environment(f"{TOY}:Letters")
        defaults = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "per_device_train_batch_size": 3 * G,
            "num_generations": G,
            "max_completion_length": 5,
            "max_steps": 1,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        return GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_folder),
            args=GRPOConfig(**(defaults | options)),
            train_dataset=environment.tasks("train", 26),
            processing_class=tiny_tokenizer,
            environment=environment,
            runner=RewardRunner({"judge": ByGroup(pattern)}),
            budget=ErrorBudget(),
            run=open_run(tmp_path),
            dynamic_sampling=attempts,
        )

    return make


def logs(trainer):
    found = {key: value for line in trainer.state.log_history for key, value in line.items()}
    names = ("attempts", "extra_rollouts", "total_extra_rollouts", "groups_kept", "cap_reached")
    return [found[f"dynamic_sampling/{name}"] for name in names] + [found["frac_reward_zero_std"]]


def rollouts(trainer):
    trainer.run.flush()
    return pd.concat([pd.read_parquet(f) for f in sorted((trainer.run.path / "rollouts").glob("*.parquet"))])


def trained_on(trainer):
    """The batch of the last step, by the tasks of its groups."""
    batch = trainer._buffered_inputs[0]
    assert len(batch["advantages"]) == 3 * G
    return batch


def test_a_full_batch_is_left_alone(make):
    trainer = make("s")
    trainer.train()
    assert logs(trainer) == [0, 0, 0, 1.0, 0, 0.0]
    assert rollouts(trainer)["kept"].all() and len(rollouts(trainer)) == 12


def test_groups_without_spread_are_replaced(make):
    """3 groups: one good. 2 more are drawn: one good. 1 more is drawn: good."""
    trainer = make(["s", "a", "a", "a", "s", "s"])
    trainer.train()
    extra = 3 * G
    assert logs(trainer) == pytest.approx([2, extra, extra, 3 / 6, 0, 2 / 3])
    assert (trained_on(trainer)["advantages"].abs() > 0.5).all()
    frame = rollouts(trainer)
    assert len(frame) == 6 * G and frame["kept"].sum() == 3 * G
    assert frame.groupby("kept")["advantage"].apply(lambda a: (a != 0).all()).tolist() == [False, True]
    tasks = frame.groupby("task_id").size()
    assert (tasks % G == 0).all()


def test_the_batch_is_made_of_the_kept_rollouts(make, tiny_tokenizer):
    trainer = make(["s", "a", "a", "a", "s", "s"])
    trainer.train()
    batch = trained_on(trainer)
    texts = {
        (round(a, 4), tiny_tokenizer.decode(ids[mask.bool()], skip_special_tokens=True))
        for a, ids, mask in zip(
            batch["advantages"].tolist(), batch["completion_ids"], batch["completion_mask"], strict=True
        )
    }
    frame = rollouts(trainer)
    kept = frame[frame["kept"]]
    assert texts == {(round(a, 4), c) for a, c in zip(kept["advantage"], kept["completion"], strict=True)}
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()


def test_the_cap(make):
    trainer = make("a", attempts=2)
    trainer.train()
    assert logs(trainer) == [2, 6 * G, 6 * G, 0, 1, 1.0]
    assert (trained_on(trainer)["advantages"] == 0).all()
    assert rollouts(trainer)["kept"].sum() == 3 * G


def test_the_count_is_kept_over_steps_and_in_the_state(make):
    trainer = make("a", attempts=1, max_steps=2)
    trainer.train()
    assert trainer.dynamic_sampling.extra_rollouts == 6 * G
    other = make("a")
    other.dynamic_sampling.load_state_dict(trainer.dynamic_sampling.state_dict())
    assert other.dynamic_sampling.extra_rollouts == 6 * G


def test_what_is_logged_is_that_of_the_tasks_that_were_due(make):
    """The reward of replacements would flatter the model."""
    trainer = make(["a", "a", "a", "s", "s", "s"])
    trainer.train()
    (reward,) = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert reward == pytest.approx(0.3)


def test_parts_of_groups_are_refused(make):
    """TRL deals groups out to processes; what one of them gets need not be whole groups."""
    trainer = make("s")
    trainer.runner = RewardRunner({"judge": lambda completion: 1.0})
    trainer.args.per_device_train_batch_size = 6
    with (
        trainer.runner,
        pytest.raises(UserError, match=r"dynamic_sampling judges whole groups.*6 rollouts.*\(4\)"),
    ):
        trainer._check_settings()


def test_an_answer_that_no_reward_applies_to_is_no_spread(make):
    trainer = make("a", attempts=1)
    trainer.runner.rewards["judge"].__class__.__call__ = lambda self, group: [None, *[1.0] * (len(group) - 1)]
    trainer.train()
    assert logs(trainer)[3:] == [0, 1, 1.0]
    assert rollouts(trainer)["reward"].isna().sum() == 6


def test_each_attempt_draws_other_tasks(make, monkeypatch):
    """Also where TRL samples by itself, as with vLLM."""
    trainer = make("a", attempts=3)
    monkeypatch.setattr(
        trainer, "_generate_single_turn", lambda ids, *_, **__: ([[5, 6, 2] for _ in ids], None)
    )
    trainer.train()
    tasks = rollouts(trainer)["task_id"].tolist()
    attempts = [tuple(tasks[i : i + 3 * G]) for i in range(0, len(tasks), 3 * G)]
    assert len(set(attempts)) == 4
