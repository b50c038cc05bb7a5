"""Dynamic sampling replaces groups of equal rewards, up to a cap, and logs what it sampled for that."""

import pandas as pd
import pytest

from rlkit.errors import UserError
from rlkit.scoring import RewardRunner
from rlkit.training.settings import check_settings

G = 4


class GroupPattern:
    """A group reward that follows a pattern of groups: "s" has spread, in "a" all rewards are alike.

    It has state, so that it runs in this process, where the tests can read `calls`.
    """

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
def make(make_trainer):
    """Return a function that builds a trainer of three groups a step; see `make_trainer`."""

    def make(pattern, attempts=4, **options):
        rewards = {"judge": GroupPattern(pattern)}
        return make_trainer(
            rewards,
            dynamic_sampling=attempts,
            per_device_train_batch_size=3 * G,
            num_generations=G,
            **options,
        )

    return make


def logs(trainer):
    """Return the last values that dynamic sampling logged, and the share of groups of equal rewards."""
    logged = {name: value for line in trainer.state.log_history for name, value in line.items()}
    names = ("attempts", "extra_rollouts", "total_extra_rollouts", "groups_kept", "cap_reached")
    return [logged[f"dynamic_sampling/{name}"] for name in names] + [logged["frac_reward_zero_std"]]


def rollouts(trainer):
    """Return the saved rollouts of a run."""
    trainer.run_dir.flush()
    files = sorted((trainer.run_dir.path / "rollouts").glob("*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files])


def trained_on(trainer):
    """Return the batch of the last step."""
    batch = trainer._buffered_inputs[0]
    assert len(batch["advantages"]) == 3 * G
    return batch


def test_batch_without_equal_rewards_is_not_resampled(make):
    trainer = make("s")
    trainer.train()
    assert logs(trainer) == [0, 0, 0, 1.0, 0, 0.0]
    assert rollouts(trainer)["kept"].all() and len(rollouts(trainer)) == 12


def test_groups_of_equal_rewards_are_replaced(make):
    """One of 3 groups has spread. Of 2 more groups one has, and the last group, drawn alone, has."""
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


def test_batch_consists_of_the_rollouts_saved_as_kept(make, tiny_tokenizer):
    trainer = make(["s", "a", "a", "a", "s", "s"])
    trainer.train()
    batch = trained_on(trainer)
    trained = {
        (round(a, 4), tiny_tokenizer.decode(ids[mask.bool()], skip_special_tokens=True))
        for a, ids, mask in zip(
            batch["advantages"].tolist(), batch["completion_ids"], batch["completion_mask"], strict=True
        )
    }
    frame = rollouts(trainer)
    frame = frame[frame["kept"]]
    assert trained == {(round(a, 4), c) for a, c in zip(frame["advantage"], frame["completion"], strict=True)}
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()


def test_attempts_cap_the_resampling(make):
    trainer = make("a", attempts=2)
    trainer.train()
    assert logs(trainer) == [2, 6 * G, 6 * G, 0, 1, 1.0]
    assert (trained_on(trainer)["advantages"] == 0).all()
    assert rollouts(trainer)["kept"].sum() == 3 * G


def test_state_holds_the_number_of_extra_rollouts_of_all_steps(make):
    trainer = make("a", attempts=1, max_steps=2)
    trainer.train()
    assert trainer.dynamic_sampling.extra_rollouts == 6 * G
    resumed = make("a")
    resumed.dynamic_sampling.load_state_dict(trainer.dynamic_sampling.state_dict())
    assert resumed.dynamic_sampling.extra_rollouts == 6 * G


def test_logged_reward_is_that_of_the_original_tasks(make):
    """The rewards of the replacements are selected to differ, so their mean would mislead."""
    trainer = make(["a", "a", "a", "s", "s", "s"])
    trainer.train()
    (reward,) = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert reward == pytest.approx(0.3)


def test_settings_that_split_groups_over_processes_are_rejected(make):
    """TRL shards rollouts over processes without regard to groups, and a split group cannot be replaced."""
    trainer = make("s")
    trainer.runner = RewardRunner({"judge": lambda completion: 1.0})
    trainer.args.per_device_train_batch_size = 6
    with (
        trainer.runner,
        pytest.raises(UserError, match=r"dynamic_sampling needs whole groups.*6 rollouts.*\(4\)"),
    ):
        check_settings(trainer)


def test_rollout_without_a_reward_is_no_spread(make):
    trainer = make("a", attempts=1)
    trainer.runner.rewards["judge"].__class__.__call__ = lambda self, group: [None, *[1.0] * (len(group) - 1)]
    trainer.train()
    assert logs(trainer)[3:] == [0, 1, 1.0]
    assert rollouts(trainer)["reward"].isna().sum() == 6


def test_each_attempt_draws_new_tasks(make, monkeypatch):
    """TRL's own sampling is replaced by fixed tokens, so that only the drawing of tasks is random."""
    trainer = make("a", attempts=3)
    monkeypatch.setattr(
        trainer, "_generate_single_turn", lambda ids, *_, **__: ([[5, 6, 2] for _ in ids], None)
    )
    trainer.train()
    tasks = rollouts(trainer)["task_id"].tolist()
    attempts = [tuple(tasks[i : i + 3 * G]) for i in range(0, len(tasks), 3 * G)]
    assert len(set(attempts)) == 4
