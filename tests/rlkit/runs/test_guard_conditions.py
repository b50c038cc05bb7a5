"""`RewardWindows`: which histories of the training reward count as a collapse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.runs.guard_conditions import MIN_REWARD_RATIO, REWARD_WINDOW, RewardWindows

rewards = st.floats(0, 1)


def messages(values, windows=None):
    """Return the message at the end of each window, or None."""
    windows = windows or RewardWindows()
    results = []
    for step, value in enumerate(values, 1):
        windows.values.append(value)
        if len(windows.values) == REWARD_WINDOW:
            results.append(windows.complete(step))
    return results


@given(st.lists(rewards, min_size=REWARD_WINDOW, max_size=8 * REWARD_WINDOW))
def test_only_a_mean_below_half_of_the_best_is_a_collapse(values):
    means = np.reshape(values[: len(values) // REWARD_WINDOW * REWARD_WINDOW], (-1, REWARD_WINDOW)).mean(1)
    for i, message in enumerate(messages(values)):
        if message is not None:
            assert means[i] < MIN_REWARD_RATIO * means[:i].max()


@given(st.lists(rewards, min_size=REWARD_WINDOW, max_size=6 * REWARD_WINDOW), st.floats(0.01, 100))
def test_the_scale_of_the_reward_does_not_matter(values, scale):
    values = [round(value, 3) for value in values]
    scaled = messages([value * scale for value in values])
    assert [m is None for m in messages(values)] == [m is None for m in scaled]


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("prompts", [4, 8])
def test_hardly_any_stationary_run_is_reported(rate, prompts):
    """In 2,000 steps on tasks of very different difficulty, with eight answers to each."""
    generator = np.random.default_rng(0)
    num_reported = 0
    for _ in range(50):
        chances = generator.beta(0.8 * rate, 0.8 * (1 - rate), (2000, prompts))
        num_reported += any(messages(generator.binomial(8, chances).mean(1) / 8))
    assert num_reported <= 2


@pytest.mark.parametrize("start, end", [(0.5, 0.0), (0.9, 0.1), (0.3, 0.0), (1.0, -1.0)])
def test_a_collapse_is_reported(start, end):
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.1, 6 * REWARD_WINDOW)
    fall = np.repeat([start, start, start, (start + end) / 2, end, end], REWARD_WINDOW)
    results = messages(fall + noise)
    assert not any(results[:3])
    assert all(results[4:])


def test_a_best_mean_below_0_has_no_half():
    assert not any(messages([-0.4] * REWARD_WINDOW + [-0.5] * REWARD_WINDOW))
