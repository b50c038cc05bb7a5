"""TRL's reward functions get what TRL passes them: every value equals that of TRL's own call."""

import enum
import sys
from collections import Counter
from decimal import Decimal
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
import torch
import trl
import trl.rewards
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState as TransformersTrainerState

from rlkit.reward import RewardCall, TrainerState, call_reward
from rlkit.scoring import RewardRunner

# A worker cannot import test modules by name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

STATE = TrainerState(global_step=30, max_steps=100, epoch=0.5, num_train_epochs=2)
# Two prompts with four completions each, the answer in a box after a thought.
COMPLETIONS = [
    "<think>\n2 plus 2\n</think>\n\\boxed{4}",
    "<think>\nlet me see\n</think>\n\\boxed{4}",
    "\\boxed{5}",
    "I do not know",
    "<think>\nhm hm hm hm\n</think>\n\\boxed{9}",
    "The answer is \\boxed{9} because because because because",
    "\\boxed{9}",
    "<think>unfinished",
]
REWARDS = {
    "accuracy_reward": trl.rewards.accuracy_reward,
    "reasoning_accuracy_reward": trl.rewards.reasoning_accuracy_reward,
    "think_format_reward": trl.rewards.think_format_reward,
    "get_cosine_scaled_reward": trl.rewards.get_cosine_scaled_reward(max_len=40),
    "get_repetition_penalty_reward": trl.rewards.get_repetition_penalty_reward(
        ngram_size=2, max_penalty=-1.0
    ),
    "get_soft_overlong_punishment": trl.rewards.get_soft_overlong_punishment(40, 20),
}


def make_rows(completions=COMPLETIONS, *, chat=True):
    """Return rows as training builds them: `completions` is split into two groups of one task each."""
    size = len(completions) // 2
    rows = []
    for i, completion in enumerate(completions):
        question, solution = (("2 + 2?", "$4$"), ("3 * 3?", "$9$"))[i // size]
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}] if chat else question,
                "task_id": question,
                "solution": solution,
                "completion": completion,
                "completion_ids": list(completion.encode()),
                "turns": [{"role": "assistant", "content": completion}],
                "truncated": False,
                "stopped": False,
                "invalid": None,
                "environment_tokens": 0,
                "max_length": 99,
            }
        )
    return rows


def call_as_trl(rewards, rows):
    """Call rewards with the code of TRL's trainer; return the values (N, R) and what was logged."""
    logged = {"metrics": [], "columns": {}}
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=False),
        state=TransformersTrainerState(
            global_step=STATE.global_step, max_steps=STATE.max_steps, epoch=STATE.epoch, num_train_epochs=2
        ),
        environments=None,
        reward_funcs=rewards,
        reward_processing_classes=[None] * len(rewards),
        reward_func_names=[str(i) for i in range(len(rewards))],
        _log_completion_extra=lambda column, values: logged["columns"].setdefault(column, list(values)),
        _log_metric=lambda name, value: logged["metrics"].append((name, value)),
        args=SimpleNamespace(report_to=[]),
        async_loop=None,
    )
    inputs = [{key: row[key] for key in ("prompt", "task_id", "solution")} for row in rows]
    is_chat = not isinstance(rows[0]["prompt"], str)
    values = trl.GRPOTrainer._calculate_rewards(
        trainer,
        inputs,
        [row["prompt"] for row in rows],
        [row["turns"] if is_chat else row["completion"] for row in rows],
        [row["completion_ids"] for row in rows],
    )
    return values, logged


@pytest.fixture(autouse=True)
def without_processes(monkeypatch):
    """Let TRL's `gather` return its argument, and its logger find the state that it needs."""
    PartialState()
    monkeypatch.setattr("trl.trainer.grpo_trainer.gather", lambda values: values)


def test_every_reward_of_the_installed_trl_is_compared():
    assert set(REWARDS) == set({name for names in trl.rewards._import_structure.values() for name in names})


def majority(completions, **kwargs):
    """Return 1 for the most frequent completion of the call."""
    texts = [completion[0]["content"] for completion in completions]
    most = Counter(texts).most_common(1)[0][0]
    return [float(text == most) for text in texts]


def normalized_length(completion_ids, **kwargs):
    """Return z-scores of the lengths over the batch."""
    lengths = np.array([len(ids) for ids in completion_ids], dtype=float)
    return ((lengths - lengths.mean()) / (lengths.std() + 1e-4)).tolist()


def curriculum(completions, solution, trainer_state, **kwargs):
    """Pay less and less for the format during training, and only on the first task."""
    share = 1 - trainer_state.global_step / trainer_state.max_steps
    return [share if answer == "$4$" else None for answer in solution]


def with_default(completions, max_length=7, length=None, task_id=None, **kwargs):
    """Names of rlkit's own columns as options with a default, which TRL would not fill."""
    assert length is None and task_id == [*["2 + 2?"] * 4, *["3 * 3?"] * 4]
    return [float(max_length)] * len(completions)


def of_kwargs(prompts, **kwargs):
    """Check the names that TRL passes."""
    extras = {"completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    assert set(kwargs) == {"task_id", "solution", *extras}, sorted(kwargs)
    return [float(prompt[0]["content"] == "2 + 2?") for prompt in prompts]


def logging(completions, log_extra, log_metric, trainer_state, **kwargs):
    log_extra("first", [completion[0]["content"][:1] for completion in completions])
    log_metric("logging/epoch", trainer_state.epoch)
    return [0.0] * len(completions)


CUSTOM = [majority, normalized_length, curriculum, with_default, of_kwargs, logging]


@pytest.mark.parametrize("name", [*REWARDS, *(reward.__name__ for reward in CUSTOM)])
def test_values_equal_those_of_trl(name):
    reward = REWARDS.get(name) or globals()[name]
    expected, logged = call_as_trl([reward], make_rows())
    with RewardRunner({name: reward}) as runner:
        scores = runner(make_rows(), 4, STATE)
    assert scores.invalid == [None] * 8
    np.testing.assert_allclose(scores.values, expected.double(), rtol=1e-6)
    assert scores.metrics == {key: [value] for key, value in logged["metrics"]}
    assert scores.columns == logged["columns"]
    assert np.unique(scores.values).size > 1 or name in ("with_default", "logging")


def test_string_prompts_get_string_completions():
    def kinds(prompts, completions, **kwargs):
        return [
            float(isinstance(prompt, str) and isinstance(text, str))
            for prompt, text in zip(prompts, completions, strict=True)
        ]

    rows = make_rows(chat=False)
    assert call_as_trl([kinds], rows)[0].tolist() == [[1.0]] * 8
    with RewardRunner({"kinds": kinds}) as runner:
        assert runner(rows, 4).values.tolist() == [[1.0]] * 8


def test_all_turns_are_passed_to_a_trl_reward():
    turns = [
        {"role": "assistant", "content": "<search>x</search>"},
        {"role": "user", "content": "found"},
        {"role": "assistant", "content": "4"},
    ]

    def roles(completions, **kwargs):
        return [
            float([m["role"] for m in messages] == ["assistant", "user", "assistant"])
            for messages in completions
        ]

    row = make_rows()[0] | {"turns": turns, "completion": "<search>x</search>\n4"}
    assert call_reward(roles, row) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["4", "5", "six", ""]), min_size=1, max_size=12))
def test_majority_and_lengths_see_the_whole_batch(completions):
    rows = make_rows([*completions, *completions])
    for reward in (majority, normalized_length):
        expected, _ = call_as_trl([reward], rows)
        values = torch.tensor(RewardCall(reward)(rows, STATE))[:, None]
        torch.testing.assert_close(values, expected)


def test_invalid_rows_are_removed_from_the_batch():
    rows = make_rows()
    rows[0]["invalid"] = "the search failed"
    with RewardRunner(
        {"size": lambda completions, **kwargs: [len(completions)] * len(completions)}
    ) as runner:
        scores = runner(rows, 4)
    assert scores.values[1:, 0].tolist() == [7] * 7 and scores.invalid[0] == "the search failed"


def test_items_that_are_no_numbers_make_only_their_rows_invalid():
    def mixed(completions, **kwargs):
        return [1.0, float("nan"), ValueError("no"), np.ma.masked, "1", 2, 10**400, np.float32(0.5)]

    with RewardRunner({"mixed": mixed}) as runner:
        scores = runner(make_rows(), 4)
    assert scores.values[[0, 5, 7], 0].tolist() == [1, 2, 0.5]
    assert np.isnan(scores.values[[1, 2, 3, 4, 6]]).all()
    assert scores.invalid == [
        None,
        "mixed: ValueError: returned nan",
        "mixed: ValueError: no",
        "mixed: ValueError: returned a masked value",
        "mixed: TypeError: returned '1', which is not a number",
        None,
        "mixed: ValueError: returned a number that is too large for a float",
        None,
    ]
    assert scores.error_counts == {"mixed": 5}


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (dict.fromkeys(range(8), 1.0), "TypeError: returned a dict, not a list with one value per rollout"),
        (set(range(8)), "TypeError: returned a set, not a list with one value per rollout"),
        ("12345678", "TypeError: returned a str, not a list with one value per rollout"),
        (1.0, "TypeError: returned a float, not a list with one value per rollout"),
        (None, "TypeError: returned a NoneType, not a list with one value per rollout"),
        ([1.0], "ValueError: returned 1 values for 8 rollouts"),
    ],
)
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_group_and_batch_rewards_must_return_one_value_per_rollout(result, reason, scope):
    functions = {"group": lambda group: result, "batch": lambda completions, **kwargs: result}
    with RewardRunner({"f": functions[scope]}) as runner:
        scores = runner(make_rows(), 8)
    assert scores.invalid == [f"f: {reason}"] * 8


def test_any_reward_may_read_the_state_and_log():
    def native(completion, trainer_state, log_metric, log_extra):
        log_metric("native/length", len(completion))
        log_extra("native", [{"step": trainer_state.global_step}])
        return trainer_state.max_steps

    async def group_reward(group, log_extra):
        log_extra("group", [row["completion"][:1] for row in group])
        return [0.0] * len(group)

    with RewardRunner({"native": native, "group_reward": group_reward}) as runner:
        scores = runner(make_rows(["a", "bb"]), 1, STATE)
    assert scores.values[:, 0].tolist() == [100, 100]
    assert scores.metrics == {"native/length": [1, 2]}
    assert scores.columns == {"native": ['{"step": 30}'] * 2, "group": ["a", "b"]}
    assert scores.logged(1) == {"native": '{"step": 30}', "group": "b"}


def test_log_extra_needs_one_value_per_rollout():
    with RewardRunner({"f": lambda completion, log_extra: log_extra("x", [1, 2]) or 1.0}) as runner:
        scores = runner(make_rows(["a", "b"]), 1)
    assert scores.invalid[0] == "f: ValueError: log_extra got 2 values of 'x' for 1 rollouts"


class Verdict(enum.StrEnum):
    GOOD = "good"


def test_loggers_accept_any_number_and_any_value():
    def reward(completion, log_metric, log_extra):
        for value in (0.5, np.float32(1.5), Decimal(2), torch.tensor(4.0), True, float("nan"), float("inf")):
            log_metric("m", value)
        circular = []
        circular.append(circular)
        log_extra("verdict", [Verdict.GOOD])
        log_extra("odd", [{(1, 2): circular}])
        return 1.0

    with RewardRunner({"reward": reward}) as runner:
        scores = runner(make_rows(["a", "b"]), 1)
    assert scores.invalid == [None, None] and scores.metrics["m"] == [0.5, 1.5, 2, 4, 1] * 2
    assert scores.columns["verdict"] == ["good", "good"] and {type(v) for v in scores.columns["verdict"]} == {
        str
    }
    with RewardRunner({"reward": lambda completion, log_metric: log_metric("m", "x") or 1.0}) as runner:
        reason = runner(make_rows(["a", "b"]), 1).invalid[0]
    assert reason == "reward: TypeError: log_metric got 'x' for 'm', which is not a number"


def test_columns_of_a_batch_are_those_of_all_rows():
    rows = make_rows(["a", "b"])
    rows[1]["extra"] = 2
    with RewardRunner({"f": lambda completions, extra, **kwargs: [n or 0 for n in extra]}) as runner:
        assert runner(rows, 1).values.tolist() == [[0], [2]]
