"""Rewards for short completions: values worked out by hand, and edge cases."""

import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.length import cosine, l1_exact, l1_max, laser, o1_pruner, soft_overlong, think_prune
from rlkit.rewards.length_group import arora_zanette, dast, grpo_lead, kimi, sigmoid


def group_of(*rollouts):
    """Return rollouts from (length, correct) or (length, correct, truncated) tuples."""
    rows = ((*rollout, False)[:3] for rollout in rollouts)
    return [{"length": length, "correct": y, "truncated": truncated} for length, y, truncated in rows]


@pytest.mark.parametrize(
    ("length", "value"), [(0, 0), (16384, 0), (18432, -0.5), (20480, -1), (20481, -1), (10**6, -1)]
)
def test_soft_overlong(length, value):
    assert soft_overlong(length, 20480, 4096) == soft_overlong(length, 20480) == value


def test_soft_overlong_with_small_limits():
    assert soft_overlong(3, 3) == -1 and soft_overlong(2, 3) == 0
    for cache in (0, 101):
        with pytest.raises(ValueError, match="cache"):
            soft_overlong(1, 100, cache)


@pytest.mark.parametrize(
    ("length", "correct", "value"), [(1500, 1, 0.85), (500, 1, 0.85), (1000, 1, 1), (1500, 0, -0.15)]
)
def test_l1_exact(length, correct, value):
    assert l1_exact(length, correct, 1000) == pytest.approx(value)


@pytest.mark.parametrize(
    ("length", "value"), [(0, 1), (500, 1), (1000, 0.5), (1250, 0.25), (1500, 0), (9999, 0)]
)
def test_l1_max(length, value):
    assert l1_max(length, 1.0, 1000) == pytest.approx(value)
    assert l1_max(length, 0.0, 1000) == 0
    assert l1_max(length, 0.5, 1000) == pytest.approx(value / 2)


@pytest.mark.parametrize("budget", [0, -1000])
def test_l1_max_rejects_nonpositive_budgets(budget):
    with pytest.raises(ValueError, match="positive"):
        l1_max(100, 1.0, budget)


def test_laser():
    assert [laser(100, 1, 100), laser(101, 1, 100), laser(100, 0, 100)] == [1.5, 1.0, -0.5]
    assert laser(100, 0.9, 100) == -0.5 and laser(100, 1, 100, bonus=0.2) == 1.2
    assert laser(100, 0, 100, wrong=0.0) == 0


@pytest.mark.parametrize(
    ("length", "if_correct", "if_wrong"),
    [(0, 1, -1), (500, 0.75, -0.75), (1000, 0.5, -0.5), (2000, 0.5, -0.5)],
)
def test_cosine(length, if_correct, if_wrong):
    assert cosine(length, 1.0, 1000) == pytest.approx(if_correct)
    assert cosine(length, 0.0, 1000) == pytest.approx(if_wrong)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_cosine_prefers_short_correct_and_long_wrong_answers(a, b):
    short, long = sorted((a, b))
    assert cosine(short, 1.0, 2000) >= cosine(long, 1.0, 2000) >= 0.5
    assert cosine(short, 0.0, 2000) <= cosine(long, 0.0, 2000) <= -0.5


def test_think_prune():
    assert think_prune(4000, 1.0, truncated=False) == 1
    assert think_prune(4000, 1.0, truncated=True) == 0
    assert think_prune(4000, 1.0, truncated=False, limit=4000) == 1
    assert think_prune(4001, 1.0, truncated=False, limit=4000) == 0
    assert think_prune(10, 0.0, truncated=False) == 0 and think_prune(10, 0.5, truncated=False) == 0.5


def test_o1_pruner():
    assert o1_pruner(100, 1, 150, 0.8) == pytest.approx(0.5 + 5 * 0.2)
    assert o1_pruner(200, 0, 100, 0.1) == pytest.approx(-0.5 - 0.5)
    assert o1_pruner(200, 0, 100, 0.9) == -2 and o1_pruner(10, 1, 1000, 0.5) == 4
    assert o1_pruner(0, 0, 2, 0.0) == 1  # an empty completion counts as one token
    assert o1_pruner(100, 1, 150, 0.8, alpha=1.0) == pytest.approx(0.7)


def test_kimi():
    assert kimi(group_of((100, 1), (200, 1), (300, 1))) == [0.5, 0, -0.5]
    assert kimi(group_of((100, 0), (200, 0), (300, 0))) == [0, 0, -0.5]
    assert kimi(group_of((300, 0), (100, 1), (200, 0.5))) == [-0.5, 0.5, 0]


def test_kimi_normalizes_over_wrong_answers_too():
    assert kimi(group_of((100, 0), (200, 1), (300, 0))) == [0, 0, -0.5]


def test_kimi_is_0_for_equal_lengths():
    assert kimi(group_of((100, 1), (100, 0))) == kimi(group_of((0, 1), (0, 0))) == [0, 0]
    assert kimi(group_of((100, 1))) == [0]


def test_arora_zanette():
    assert arora_zanette(group_of((100, 1), (90, 0))) == [pytest.approx(0.95), 0]
    values = arora_zanette(group_of((100, 1), (300, 1), (900, 0)))  # mean 200, std 100: z is -1 and 1
    assert values == pytest.approx([1 - 0.1 * sigmoid(-1), 1 - 0.1 * sigmoid(1), 0])
    assert arora_zanette(group_of((100, 1), (300, 1)), alpha=0.4)[0] == pytest.approx(1 - 0.4 * sigmoid(-1))


def test_arora_zanette_with_equal_lengths():
    assert arora_zanette(group_of((70, 1), (70, 1), (70, 0)), alpha=0.2) == pytest.approx([0.9, 0.9, 0])


def test_arora_zanette_of_only_wrong_answers():
    assert arora_zanette(group_of((70, 0), (80, 0))) == [0, 0]


def test_arora_zanette_of_truncated_completions_is_0():
    values = arora_zanette(group_of((100, 1), (300, 1), (9000, 1, True)))
    assert values == pytest.approx([1 - 0.1 * sigmoid(-1), 1 - 0.1 * sigmoid(1), 0])


def test_grpo_lead():
    values = grpo_lead(group_of((105, 1), (100, 1), (900, 0)))  # mean 102.5, sample standard deviation 3.54
    assert values == pytest.approx([0.965, 1.036, -1], abs=5e-4)
    z = math.sqrt(0.5)
    assert values == pytest.approx([math.exp(-0.05 * z), math.exp(0.05 * z), -1])
    assert grpo_lead(group_of((100, 1), (300, 1)), alpha=1.0)[1] == pytest.approx(math.exp(-z))


@given(st.lists(st.tuples(st.integers(0, 9999), st.sampled_from([0, 1])), min_size=1, max_size=9))
def test_grpo_lead_equals_the_released_formula(rollouts):
    """`main_ppo.py` calls torch.std, which divides by n - 1, and sets it to 1 for a single right answer."""
    lengths = torch.tensor([length for length, correct in rollouts if correct], dtype=torch.float64)
    deviation = torch.std(lengths) if len(lengths) > 1 else torch.tensor(1.0)
    for (length, correct), value in zip(rollouts, grpo_lead(group_of(*rollouts)), strict=True):
        z = (length - lengths.mean()) / (deviation + 1e-6)
        assert value == (pytest.approx(math.exp(-0.05 * z)) if correct else -1)


def test_grpo_lead_edge_cases():
    assert grpo_lead(group_of((70, 1), (70, 1))) == [1, 1]
    assert grpo_lead(group_of((70, 1), (90, 0), (900, 0))) == [1, -1, -1]
    assert grpo_lead(group_of((70, 0), (90, 0))) == [-1, -1]
    assert grpo_lead(group_of((70, 0.5))) == [-1]


def test_grpo_lead_scores_truncated_completions_by_length():
    assert grpo_lead(group_of((100, 1), (300, 1, True))) == grpo_lead(group_of((100, 1), (300, 1)))


def test_dast():
    # Half of the answers are correct, with 100 tokens on average. With a limit of 300, the budget is 200.
    values = dast(group_of((50, 1), (150, 1), (100, 0), (300, 0)), max_length=300)
    assert values == pytest.approx([0.5 + 0.375, 0.5 + 0.125, -0.55, -0.1])


def test_dast_edge_cases():
    assert dast(group_of((300, 0), (150, 0)), max_length=300) == pytest.approx([-0.1, -0.55])
    assert dast(group_of((100, 1), (100, 1)), max_length=300) == pytest.approx([0.5, 0.5])
    assert dast(group_of((10, 1), (1000, 1)), max_length=1000)[1] == pytest.approx(0.1)
    assert dast(group_of((0, 1)), max_length=300) == pytest.approx([0.5])


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()),
        min_size=1,
        max_size=16,
    )
)
def test_group_rewards_are_finite_and_independent_of_the_order(rollouts):
    for reward in (arora_zanette, kimi, grpo_lead, partial(dast, max_length=1000)):
        values = reward(group_of(*rollouts))
        assert len(values) == len(rollouts) and all(math.isfinite(value) for value in values)
        assert reward(group_of(*reversed(rollouts))) == pytest.approx(values[::-1])


def test_rewards_with_arguments_can_be_pickled():
    assert pickle.loads(pickle.dumps(partial(l1_max, alpha=0.01)))(1010, 1.0, 1000) == pytest.approx(0.45)
