"""`RewardWindows`: which histories of the training reward count as a collapse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.runs.guard_conditions import REWARD_WINDOW, RewardWindows


def messages(rewards):
    """Return the message at the end of each window, or None."""
    windows = RewardWindows()
    results = []
    for step, reward in enumerate(rewards, 1):
        windows.rewards.append(reward)
        if len(windows.rewards) == REWARD_WINDOW:
            results.append(windows.complete(step))
    return results


def sampled_rewards(generator, rates, prompts):
    """Return the mean reward of each step: eight answers to each prompt, which differ in difficulty."""
    chances = generator.beta(0.8 * rates, 0.8 * (1 - rates), (prompts, len(rates)))
    return generator.binomial(8, chances).mean(0) / 8


@given(
    st.lists(st.lists(st.floats(0, 0.1), min_size=REWARD_WINDOW, max_size=REWARD_WINDOW), min_size=1),
    st.integers(1, 4),
)
def test_reward_windows_report_a_mean_below_half_of_the_best(low, num_high):
    """With a spread of at most 0.1, a mean of 1 and one of at most 0.1 differ by many standard errors."""
    rewards = [1.0] * REWARD_WINDOW * num_high + [reward for window in low for reward in window]
    results = messages(rewards)
    assert not any(results[:num_high])
    assert all(results[num_high:])


@pytest.mark.parametrize("ratio, is_reported", [(0.51, False), (0.49, True)])
@given(best=st.floats(0.01, 100))
def test_reward_windows_compare_with_half_of_the_best_mean(best, ratio, is_reported):
    (_, _, message) = messages(
        [0.0] * REWARD_WINDOW + [best] * REWARD_WINDOW + [ratio * best] * REWARD_WINDOW
    )
    assert (message is not None) == is_reported


# Multiples of 1/64: the squares of much smaller rewards would underflow at one of the scales.
@given(
    st.lists(st.integers(0, 64).map(lambda n: n / 64), min_size=REWARD_WINDOW, max_size=6 * REWARD_WINDOW),
    st.sampled_from([2.0**k for k in range(-7, 8)]),
)
def test_reward_windows_do_not_depend_on_the_scale(rewards, scale):
    scaled = messages([reward * scale for reward in rewards])
    assert [message is None for message in messages(rewards)] == [message is None for message in scaled]


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("prompts", [4, 8])
def test_reward_windows_report_at_most_4_percent_of_runs_without_a_trend(rate, prompts):
    generator = np.random.default_rng(0)
    rates = np.full(2000, rate)
    assert sum(any(messages(sampled_rewards(generator, rates, prompts))) for _ in range(50)) <= 2


@pytest.mark.parametrize("late", [100, 1000])
def test_reward_windows_report_at_most_4_percent_of_runs_that_learn_late(late):
    generator = np.random.default_rng(0)
    rates = np.r_[np.full(late, 0.005), np.full(300, 0.4)]
    assert sum(any(messages(sampled_rewards(generator, rates, 4))) for _ in range(50)) <= 2


@pytest.mark.parametrize("start, end", [(0.5, 0.0), (0.9, 0.1), (0.4, 0.0), (1.0, -1.0)])
def test_reward_windows_report_a_collapse_in_noise(start, end):
    noise = np.random.default_rng(0).normal(0, 0.1, 6 * REWARD_WINDOW)
    fall = np.repeat([start, start, start, (start + end) / 2, end, end], REWARD_WINDOW)
    results = messages(fall + noise)
    assert not any(results[:3])
    assert all(results[4:])


def test_reward_windows_ignore_a_negative_best_mean():
    assert not any(messages([-0.4] * REWARD_WINDOW + [-0.5] * REWARD_WINDOW))
