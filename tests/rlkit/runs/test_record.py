"""Rollout records: training and evaluation write the same format, and `RolloutFiles` reads it."""

import math
import sys

import cloudpickle
import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from rlkit.environment import Environment
from rlkit.errors import UserError
from rlkit.evaluation import evaluate
from rlkit.reward import completion_length
from rlkit.rollouts import Rollout
from rlkit.runs.record import RolloutFiles, prompt_text, rollout_record
from rlkit.scoring import RewardRunner

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module

EOS = 2
SYSTEM_AND_USER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def right(completion, length):
    """Return 1 if the length that rewards read is 2."""
    return float(length == 2)


class Short(Environment):
    id = "short-v1"
    metric = "right"
    rewards = {"right": right}  # noqa: RUF012
    reward_weights = {"right": 1.0}  # noqa: RUF012
    breakdown = ("level",)

    def tasks(self, split, n=None, seed=0):
        return Dataset.from_list([{"prompt": SYSTEM_AND_USER, "task_id": "a", "level": 1}])

    def answer(self, task):
        return "4"


def test_prompt_text_names_roles_of_several_messages():
    assert prompt_text("plain") == "plain"
    assert prompt_text([{"role": "user", "content": "1 + 1?"}]) == "1 + 1?"
    assert prompt_text(SYSTEM_AND_USER) == "[system] Be brief.\n\n[user] 2+2?"


def test_training_and_evaluation_write_the_same_record():
    """The length of [5, 6, EOS] is 2 in the reward, the saved rollout and the evaluation."""
    environment = Short()
    rollout = Rollout.single("4", [5, 6, EOS], False)
    (task,) = environment.tasks("test")
    with RewardRunner(dict(environment.rewards), metric="right") as runner:
        scores = runner([task | rollout.columns()], 1)
        evaluated = evaluate(
            lambda tasks, samples: [[rollout] for _ in tasks],
            environment,
            runner,
            name="after",
            model="m",
            environment_args={},
            temperature=0.0,
        )
    values = dict(zip(runner.names, scores.values[0].tolist(), strict=True))
    trained = rollout_record(environment, task | rollout.columns(), values, invalid=None)
    assert trained == evaluated.completions[0]
    assert trained["length"] == evaluated.length == 2 and values == {"right": 1.0}
    assert trained["prompt"] == "[system] Be brief.\n\n[user] 2+2?" and trained["score"] == 1.0


@given(st.lists(st.integers(3, 9), max_size=6), st.sampled_from(["end", "stop", "length"]))
def test_record_length_is_what_rewards_read(ids, finish):
    """Only a turn that ended with EOS has a token that does not count."""
    rollout = Rollout.single("text", [*ids, EOS] if finish == "end" else ids, finish == "length")
    rollout.stopped = finish == "stop"
    row = {"prompt": "p", "task_id": "a", "level": 1, **rollout.columns()}
    record = rollout_record(Short(), row, {"right": math.nan}, invalid=None)
    assert record["length"] == completion_length(row) == len(ids)
    assert record["score"] is None and record["rewards/right"] is None


def record_of(i, **changes):
    row = {"prompt": "p", "task_id": f"t{i}", "level": i} | Rollout.single("x", [5, EOS], False).columns()
    return rollout_record(Short(), row, {"right": 1.0}, invalid=None, reward=float(i)) | changes


def test_rollout_files_read_what_a_run_directory_wrote(tmp_path, open_run):
    run = open_run(tmp_path / "run")
    records = [record_of(0), record_of(1, score=None, invalid="right: ValueError: no")]
    run.save_rollouts(3, records)
    run.flush()
    files = RolloutFiles(run.path)
    assert list(files.files) == [3] and set(files.columns(3)) == set(records[0])
    assert files.read(3) == records
    assert files.read(3, ["score", "none"]) == [{"score": 1.0}, {"score": None}]


def test_steps_can_be_read_as_one_table_if_a_reward_applied_to_none(tmp_path, open_run):
    run = open_run(tmp_path / "run")
    run.save_rollouts(1, [record_of(0, **{"rewards/right": None, "score": None, "reward": None})])
    run.save_rollouts(2, [record_of(1)])
    run.flush()
    frame = pd.read_parquet(run.path / "rollouts")
    assert frame["rewards/right"].isna().tolist() == [True, False] and frame["score"].dtype == "float64"
    assert RolloutFiles(run.path).read(1)[0]["score"] is None


def test_record_of_an_invalid_rollout_has_no_values():
    row = {"prompt": "p", "task_id": "a", "level": 1, **Rollout.single("x", [5, EOS], False).columns()}
    record = rollout_record(Short(), row, {"right": 1.0}, invalid="brief: ValueError: no", reward=1.0)
    assert record["score"] is record["reward"] is record["rewards/right"] is None


def test_rollout_files_raise_errors_for_missing_or_damaged_files(tmp_path, open_run):
    with pytest.raises(UserError, match="is not a run directory"):
        RolloutFiles(tmp_path / "nothing")
    run = open_run(tmp_path / "run")
    with pytest.raises(UserError, match="no rollouts yet"):
        RolloutFiles(run.path)
    (run.path / "rollouts" / "step-000001.parquet").write_bytes(b"PAR1")
    files = RolloutFiles(run.path)
    for read in (files.read, files.columns):
        with pytest.raises(UserError, match=r"cannot read .*step-000001\.parquet"):
            read(1)
    (run.path / "rollouts" / "step-000001.parquet").unlink()
    with pytest.raises(UserError, match="No such file"):
        files.version(1)
