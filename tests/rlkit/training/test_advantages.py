"""Advantages of HRPO and RLOO on worked examples and with invalid rollouts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit.training.advantages import by_key, leave_one_out, reward_range, solve_rate

# Hops, rewards and advantages of proposals A to H in HRPO's worked example.
HOPS = [1, 1, 1, 2, 2, 3, 3, 4]
REWARDS = torch.tensor([1.5, 0.75, 0.375, 1.25, 0.3125, 0.0, 1.0, 1.25])
EXPECTED = [1.091088, -0.218218, -0.872870, 0.707106, -0.707106, -0.707106, 0.707106, 0.0]


def test_by_key_equals_the_worked_example_of_hrpo():
    """A population standard deviation would give 1.336303 for A, a single group for all 1.3022."""
    torch.testing.assert_close(by_key(REWARDS, HOPS), torch.tensor(EXPECTED), rtol=0, atol=1e-5)


def test_by_key_without_scale_only_subtracts_the_mean():
    advantages = by_key(REWARDS, HOPS, scale=False)
    torch.testing.assert_close(advantages[:3], REWARDS[:3] - 0.875)


def test_by_key_gives_groups_below_the_minimum_no_advantage():
    assert by_key(REWARDS, HOPS, minimum=3)[3:].tolist() == [0] * 5
    assert by_key(REWARDS, HOPS, minimum=3)[0] > 1


def test_by_key_gives_a_constant_group_exactly_zero():
    for n, value in ((5, 0.3), (12, 3.3), (100, 3.3), (50, 1.7)):  # their float32 mean is not the value
        assert by_key(torch.full((n,), value), ["a"] * n).tolist() == [0] * n


@given(order=st.permutations(range(8)))
def test_by_key_does_not_depend_on_the_order_of_rollouts(order):
    index = torch.tensor(order)
    advantages = by_key(REWARDS[index], [HOPS[i] for i in order])
    torch.testing.assert_close(advantages, torch.tensor(EXPECTED)[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("baseline", [by_key, leave_one_out])
def test_invalid_rollouts_get_no_advantage_and_do_not_change_the_baseline(baseline):
    rewards = torch.tensor([1.0, torch.nan, 0.0, 0.0, torch.nan, 5.0])
    advantages = baseline(rewards, [0, 0, 0, 0, 1, 1])
    assert advantages[[1, 4]].tolist() == [0, 0]
    assert advantages[5] == 0  # the only valid one of its group
    torch.testing.assert_close(advantages[[0, 2, 3]], baseline(rewards[[0, 2, 3]], [0, 0, 0]))


def test_leave_one_out_subtracts_the_mean_of_the_others():
    advantages = leave_one_out(torch.tensor([1.0, 0.0, 0.0, 0.0]), [0] * 4)
    torch.testing.assert_close(advantages, torch.tensor([1, -1 / 3, -1 / 3, -1 / 3]))


def test_reward_range_is_zero_below_two_valid_rewards():
    rewards = torch.tensor([1.0, 0.5, torch.nan, 0.2, torch.nan, torch.nan])
    torch.testing.assert_close(reward_range(rewards, [0, 0, 0, 1, 1, 2]), torch.tensor([0.5, 0.0, 0.0]))


def test_solve_rate_ignores_invalid_rollouts():
    """Of a group of one correct, one wrong and two invalid rollouts, half are correct."""
    metric = torch.tensor([1.0, 0.0, *[torch.nan] * 6])
    assert solve_rate(metric, [0] * 4 + [1] * 4).tolist() == [0.5] * 4 + [0.0] * 4
