"""Problems of our own: exact, disjoint between splits, each made on its own; solutions of three lengths."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.environment import SPLITS
from rlkit.envs.math import MathEnvironment
from rlkit.envs.math.arithmetic import ArithmeticLaw, Calculation, make_problem, solve, split_of
from rlkit.errors import UserError

laws = st.builds(
    ArithmeticLaw,
    terms=st.sampled_from([(2, 2), (3, 3), (2, 6)]),
    max_number=st.integers(9, 200),
    operations=st.lists(st.sampled_from("+-*"), min_size=1, max_size=3, unique=True),
    kinds=st.just(["expression"]),
)
seeds = st.integers(0, 2**32)


def test_a_calculation_is_worked_out_products_first():
    calculation = Calculation([7, 3, 4, 5], ["+", "*", "-"])
    assert str(calculation) == "7 + 3 * 4 - 5"
    assert calculation.value() == 14
    assert solve(calculation, "steps") == "3 * 4 = 12\n7 + 12 = 19\n19 - 5 = 14\n\\boxed{14}"


def test_a_verbose_solution_restates_and_checks():
    assert solve(Calculation([7, 12, 5], ["+", "-"]), "verbose") == "\n".join(
        [
            "Find 7 + 12 - 5.",
            "7 + 12 = 19, then 19 - 5.",
            "19 - 5 = 14",
            "Check: 19 - 12 = 7, 14 + 5 = 19.",
            r"\boxed{14}",
        ]
    )


def test_the_styles_differ_in_length():
    lengths = {}
    for style in ("steps", "verbose", "mixed"):
        tasks = MathEnvironment(solution_style=style).tasks("train", 200)
        lengths[style] = [len(text) for text in tasks["solution"]]
    short, verbose, mixed = (sum(lengths[style]) / 200 for style in ("steps", "verbose", "mixed"))
    assert 2 < verbose / short < 3.1
    assert short * 1.5 < mixed < verbose / 1.2
    assert min(lengths["mixed"]) <= min(lengths["steps"]) + 2
    assert max(lengths["mixed"]) >= max(lengths["verbose"]) - 2


@settings(max_examples=60, deadline=None)
@given(laws, seeds, st.integers(0, 50), st.sampled_from(SPLITS))
def test_a_problem_is_exact_and_its_steps_hold(law, seed, i, split):
    calculation, kind, text = make_problem(law, split, seed, i)
    assert kind == "expression" and text == f"What is {calculation}?"
    assert calculation.value() == eval(str(calculation))
    assert law.terms[0] <= len(calculation.numbers) <= law.terms[1]
    assert set(calculation.signs) <= set(law.operations)
    if "*" not in law.operations:
        assert calculation.value() >= 0
    for style in ("steps", "verbose", "mixed"):
        solution = solve(calculation, style)
        assert solution.endswith(f"\\boxed{{{calculation.value()}}}")
        for left, right in re.findall(r"([-\d]+ [-+*] [-\d]+) = (-?\d+)", solution):
            assert eval(left) == int(right)


@settings(max_examples=30, deadline=None)
@given(laws, seeds, st.integers(0, 50), st.sampled_from(SPLITS))
def test_a_problem_is_its_splits_alone(law, seed, i, split):
    calculation, _, text = make_problem(law, split, seed, i)
    assert split_of(str(calculation)) == split
    assert make_problem(law, split, seed, i)[2] == text


def test_task_i_does_not_depend_on_how_many_are_made():
    environment = MathEnvironment(kind=["expression", "story"], terms=[2, 4])
    assert environment.tasks("dev", 30, seed=3)[:10] == environment.tasks("dev", 10, seed=3)[:]


def test_stories_of_a_calculation_and_the_calculation_are_in_one_split():
    told = MathEnvironment(kind="story").tasks("train", 500)["solution"]
    asked = MathEnvironment().tasks("test", 500, seed=1)["solution"]
    assert not {text.partition(" =")[0] for text in told if text.count("\n") < 2} & set(asked)
    assert not set(told) & set(asked)


def test_stories_read_well():
    environment = MathEnvironment(kind="story", operations=["+", "-"], terms=[2, 4], max_number=9)
    event = r"(gets \d+ more|buys \d+|finds \d+|gives away \d+|loses \d+|sells \d+)\."
    pattern = rf"(\w+) has \d+ (\w+)\. (She|He) {event}( Then s?he {event})* How many \2 does \1 have now\?"
    for task in environment.tasks("train", 200):
        assert re.fullmatch(pattern, task["problem"]), task["problem"]
        numbers = [int(number) for number in re.findall(r"\d+", task["problem"])]
        signs = [
            -1 if verb in ("gives", "loses", "sells") else 1
            for verb in re.findall(r"[Hh]e (\w+)", task["problem"])
        ]
        assert numbers[0] + sum(s * n for s, n in zip(signs, numbers[1:], strict=True)) == int(task["answer"])


def test_a_split_without_problems_is_an_error():
    law = ArithmeticLaw((2, 2), 1, ["+"], ["expression"])
    (only,) = [split for split in SPLITS if split == split_of("1 + 1")]
    other = next(split for split in SPLITS if split != only)
    assert make_problem(law, only, 0, 0)[2] == "What is 1 + 1?"
    with pytest.raises(UserError, match="raise max_number or terms"):
        make_problem(law, other, 0, 0)


@given(st.text(), st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(any))
def test_shares_of_nothing_get_nothing(text, fractions):
    assert fractions[SPLITS.index(split_of(text, fractions))] > 0
