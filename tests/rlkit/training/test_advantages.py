"""Baselines on fixed numbers: HRPO's worked table, invalid rollouts, and what no row order may change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit.training.advantages import by_key, leave_one_out, solve_rate, spread

# Hops and rewards of proposals A to H.
HOPS = [1, 1, 1, 2, 2, 3, 3, 4]
REWARDS = torch.tensor([1.5, 0.75, 0.375, 1.25, 0.3125, 0.0, 1.0, 1.25])
EXPECTED = [1.091088, -0.218218, -0.872870, 0.707106, -0.707106, -0.707106, 0.707106, 0.0]


def test_the_worked_table_of_hrpo():
    """The population's standard deviation would give 1.336303 for A, one global group 1.3022."""
    torch.testing.assert_close(by_key(REWARDS, HOPS), torch.tensor(EXPECTED), rtol=0, atol=1e-5)


def test_without_scaling():
    found = by_key(REWARDS, HOPS, scale=False)
    torch.testing.assert_close(found[:3], REWARDS[:3] - 0.875)


def test_a_group_below_the_minimum_teaches_nothing():
    assert by_key(REWARDS, HOPS, minimum=3)[3:].tolist() == [0] * 5
    assert by_key(REWARDS, HOPS, minimum=3)[0] > 1


def test_a_constant_group_is_exactly_zero():
    for n, value in ((5, 0.3), (12, 3.3), (100, 3.3), (50, 1.7)):  # float32 means that are not the value
        assert by_key(torch.full((n,), value), ["a"] * n).tolist() == [0] * n


@given(order=st.permutations(range(8)))
def test_the_order_of_rows_changes_nothing(order):
    index = torch.tensor(order)
    found = by_key(REWARDS[index], [HOPS[i] for i in order])
    torch.testing.assert_close(found, torch.tensor(EXPECTED)[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("advantages", [by_key, leave_one_out])
def test_an_invalid_rollout_is_left_out(advantages):
    rewards = torch.tensor([1.0, torch.nan, 0.0, 0.0, torch.nan, 5.0])
    keys = [0, 0, 0, 0, 1, 1]
    found = advantages(rewards, keys)
    assert found[[1, 4]].tolist() == [0, 0]
    assert found[5] == 0  # alone in its group
    torch.testing.assert_close(found[[0, 2, 3]], advantages(rewards[[0, 2, 3]], [0, 0, 0]))


def test_leave_one_out():
    found = leave_one_out(torch.tensor([1.0, 0.0, 0.0, 0.0]), [0] * 4)
    torch.testing.assert_close(found, torch.tensor([1, -1 / 3, -1 / 3, -1 / 3]))


def test_spread():
    rewards = torch.tensor([1.0, 0.5, torch.nan, 0.2, torch.nan, torch.nan])
    torch.testing.assert_close(spread(rewards, [0, 0, 0, 1, 1, 2]), torch.tensor([0.5, 0.0, 0.0]))


def test_solve_rate_leaves_invalid_rollouts_out():
    """One right, one wrong, two that could not be judged: half of them are right."""
    metric = torch.tensor([1.0, 0.0, *[torch.nan] * 6])
    assert solve_rate(metric, [0] * 4 + [1] * 4).tolist() == [0.5] * 4 + [0.0] * 4
