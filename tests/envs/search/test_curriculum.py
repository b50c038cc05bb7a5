"""The probability of noise: the published formula, its limits, and the schedule that waits for success."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.search.curriculum import Curriculum
from rlkit.errors import UserError


def at(step, steps=203, **kwargs):
    curriculum = Curriculum(**kwargs)
    curriculum.advance(step, steps, None)
    return curriculum.value


@pytest.mark.parametrize(
    ("step", "to_half", "in_the_middle", "whole"),
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
def test_zerosearch(step, to_half, in_the_middle, whole):
    assert at(step, start=0, end=0.5) == pytest.approx(to_half, abs=1e-6)
    assert at(step, start=0.25, end=0.75) == pytest.approx(in_the_middle, abs=1e-6)
    assert at(step, start=0, end=1) == pytest.approx(whole, abs=1e-6)


def test_fractions_of_the_way():
    found = [at(step, 400, start=0, end=1) for step in (100, 200, 300)]
    assert found == pytest.approx([0.138071, 1 / 3, 0.609476], abs=1e-6)


def test_base_1_is_linear():
    assert at(50, 200, start=0, end=1, base=1) == pytest.approx(0.25)
    assert at(50, 200, start=0, end=1, schedule="linear") == pytest.approx(0.25)


def test_constant():
    assert at(150, 200, start=0.3, end=0.9, schedule="constant") == 0.3
    assert at(150, 200, start=0.3, end=0.3) == pytest.approx(0.3)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 20), st.integers(1, 500))
def test_it_is_monotone_and_stays_between(start, end, base, steps):
    values = [at(step, steps, start=start, end=end, base=base) for step in range(steps + 2)]
    ordered = values if start <= end else values[::-1]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(ordered))
    assert all(min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9 for value in values)
    assert values[0] == start and values[-1] == pytest.approx(end)


def test_performance_rises_when_the_target_is_held():
    curriculum = Curriculum("performance", end=0.15, target=0.5, rise=0.1, window=2)
    seen = []
    for score in (0.9, 0.0, 0.6, 0.4, 0.6, None, 0.9, 0.1, 0.9):
        curriculum.advance(0, 10, score)
        seen.append(curriculum.value)
    # 0.9+0.0 and 0.0+0.6 are too little; 0.6+0.4 is enough; then the window begins anew.
    assert seen == pytest.approx([0, 0, 0, 0.1, 0.1, 0.1, 0.15, 0.15, 0.15])


def test_state_goes_on():
    first = Curriculum("performance", end=1.0, window=3, target=0.5)
    for score in (0.6, 0.6):
        first.advance(0, 10, score)
    second = Curriculum("performance", end=1.0, window=3, target=0.5)
    second.load_state_dict(first.state_dict())
    second.advance(0, 10, 0.6)
    assert second.value == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"schedule": "exponental"}, "exponential"),
        ({"start": -0.1}, "probabilities"),
        ({"end": 1.5}, "probabilities"),
        ({"base": 0}, "base"),
        ({"schedule": "performance", "start": 0.5, "end": 0.1}, "rises"),
    ],
)
def test_bad_arguments(kwargs, word):
    with pytest.raises(UserError, match=word):
        Curriculum(**kwargs)
