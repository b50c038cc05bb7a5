"""Noise schedules: the published formula, its limits, and the performance-based schedule."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.search.curriculum import Curriculum
from rlkit.errors import UserError


def noise_at(step, steps=203, **kwargs):
    curriculum = Curriculum(**kwargs)
    curriculum.advance(step, steps, None)
    return curriculum.value


@pytest.mark.parametrize(
    ("step", "to_half", "quarter_to_three_quarters", "to_one"),
    [
        (0, 0, 0.25, 0),
        (1, 0.001142, 0.251142, 0.002284),
        (50, 0.067831, 0.317831, 0.135663),
        (101, 0.165530, 0.415530, 0.331061),
        (152, 0.303934, 0.553934, 0.607867),
        (202, 0.495463, 0.745463, 0.990926),
        (203, 0.5, 0.75, 1),
        (250, 0.5, 0.75, 1),
    ],
)
def test_exponential_schedule_of_zerosearch(step, to_half, quarter_to_three_quarters, to_one):
    assert noise_at(step, start=0, end=0.5) == pytest.approx(to_half, abs=1e-6)
    assert noise_at(step, start=0.25, end=0.75) == pytest.approx(quarter_to_three_quarters, abs=1e-6)
    assert noise_at(step, start=0, end=1) == pytest.approx(to_one, abs=1e-6)


def test_exponential_schedule_at_the_quarters():
    values = [noise_at(step, 400, start=0, end=1) for step in (100, 200, 300)]
    assert values == pytest.approx([0.138071, 1 / 3, 0.609476], abs=1e-6)


def test_exponential_schedule_with_base_1_is_linear():
    assert noise_at(50, 200, start=0, end=1, base=1) == pytest.approx(0.25)
    assert noise_at(50, 200, start=0, end=1, schedule="linear") == pytest.approx(0.25)


def test_constant_schedule_stays_at_start():
    assert noise_at(150, 200, start=0.3, end=0.9, schedule="constant") == 0.3
    assert noise_at(150, 200, start=0.3, end=0.3) == pytest.approx(0.3)


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 20), st.integers(1, 500))
def test_last_step_has_exactly_the_noise_of_the_end(schedule, start, end, base, steps):
    for step in (steps, steps + 1):
        assert noise_at(step, steps, schedule=schedule, start=start, end=end, base=base) == end


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 20), st.integers(1, 500))
def test_exponential_schedule_is_monotone_between_start_and_end(start, end, base, steps):
    values = [noise_at(step, steps, start=start, end=end, base=base) for step in range(steps + 2)]
    ordered = values if start <= end else values[::-1]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(ordered))
    assert all(min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9 for value in values)
    assert values[0] == start and values[-1] == pytest.approx(end)


def test_performance_schedule_rises_when_the_window_reaches_the_target():
    curriculum = Curriculum("performance", end=0.15, target=0.5, rise=0.1, window=2)
    values = []
    for score in (0.9, 0.0, 0.6, 0.4, 0.6, None, 0.9, 0.1, 0.9):
        curriculum.advance(0, 10, score)
        values.append(curriculum.value)
    # (0.9, 0.0) and (0.0, 0.6) average less than 0.5; (0.6, 0.4) does not. Each rise clears the window.
    assert values == pytest.approx([0, 0, 0, 0.1, 0.1, 0.1, 0.15, 0.15, 0.15])


def test_state_dict_restores_the_window():
    first = Curriculum("performance", end=1.0, window=3, target=0.5)
    for score in (0.6, 0.6):
        first.advance(0, 10, score)
    second = Curriculum("performance", end=1.0, window=3, target=0.5)
    second.load_state_dict(first.state_dict())
    second.advance(0, 10, 0.6)
    assert second.value == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"schedule": "exponental"}, "exponential"),
        ({"start": -0.1}, "probabilities"),
        ({"end": 1.5}, "probabilities"),
        ({"base": 0}, "base"),
        ({"schedule": "performance", "start": 0.5, "end": 0.1}, "requires start <= end"),
    ],
)
def test_invalid_arguments_raise(kwargs, message):
    with pytest.raises(UserError, match=message):
        Curriculum(**kwargs)
