"""Generated arithmetic: exact answers, disjoint splits, stable tasks, and solutions of three styles."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.environment import SPLITS
from rlkit.envs.math import MathEnvironment
from rlkit.envs.math.arithmetic import ArithmeticConfig, Calculation, make_problem, solve, split_of
from rlkit.errors import UserError

configs = st.builds(
    ArithmeticConfig,
    terms=st.sampled_from([(2, 2), (3, 3), (2, 6)]),
    max_number=st.integers(9, 200),
    operations=st.lists(st.sampled_from("+-*"), min_size=1, max_size=3, unique=True),
    kinds=st.just(["expression"]),
)
seeds = st.integers(0, 2**32)


def test_calculation_performs_products_first():
    calculation = Calculation([7, 3, 4, 5], ["+", "*", "-"])
    assert str(calculation) == "7 + 3 * 4 - 5"
    assert calculation.value() == 14
    assert solve(calculation, "steps") == "3 * 4 = 12\n7 + 12 = 19\n19 - 5 = 14\n\\boxed{14}"


def test_verbose_solution_restates_and_checks():
    assert solve(Calculation([7, 12, 5], ["+", "-"]), "verbose") == "\n".join(
        [
            "Find 7 + 12 - 5.",
            "7 + 12 = 19, then 19 - 5.",
            "19 - 5 = 14",
            "Check: 19 - 12 = 7, 14 + 5 = 19.",
            r"\boxed{14}",
        ]
    )


def test_solution_styles_differ_in_length():
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
@given(configs, seeds, st.integers(0, 50), st.sampled_from(SPLITS))
def test_steps_of_a_solution_are_true_equations(config, seed, i, split):
    calculation, kind, text = make_problem(config, split, seed, i)
    assert kind == "expression" and text == f"What is {calculation}?"
    assert calculation.value() == eval(str(calculation))
    assert config.terms[0] <= len(calculation.numbers) <= config.terms[1]
    assert set(calculation.signs) <= set(config.operations)
    if "*" not in config.operations:
        assert calculation.value() >= 0
    for style in ("steps", "verbose", "mixed"):
        solution = solve(calculation, style)
        assert solution.endswith(f"\\boxed{{{calculation.value()}}}")
        for expression, value in re.findall(r"([-\d]+ [-+*] [-\d]+) = (-?\d+)", solution):
            assert eval(expression) == int(value)


@settings(max_examples=30, deadline=None)
@given(configs, seeds, st.integers(0, 50), st.sampled_from(SPLITS))
def test_make_problem_is_deterministic_and_respects_the_split(config, seed, i, split):
    calculation, _, text = make_problem(config, split, seed, i)
    assert split_of(str(calculation)) == split
    assert make_problem(config, split, seed, i)[2] == text


def test_task_i_does_not_depend_on_n():
    environment = MathEnvironment(kind=["expression", "story"], terms=[2, 4])
    assert environment.tasks("dev", 30, seed=3)[:10] == environment.tasks("dev", 10, seed=3)[:]


def test_story_and_expression_of_a_calculation_are_in_the_same_split():
    stories = MathEnvironment(kind="story").tasks("train", 500)["solution"]
    expressions = MathEnvironment().tasks("test", 500, seed=1)["solution"]
    assert not {text.partition(" =")[0] for text in stories if text.count("\n") < 2} & set(expressions)
    assert not set(stories) & set(expressions)


def test_stories_are_grammatical_and_have_the_right_answer():
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


def test_make_problem_raises_if_the_split_has_no_calculation():
    config = ArithmeticConfig((2, 2), 1, ["+"], ["expression"])
    only_split = split_of("1 + 1")
    empty_split = next(split for split in SPLITS if split != only_split)
    assert make_problem(config, only_split, 0, 0)[2] == "What is 1 + 1?"
    with pytest.raises(UserError, match="raise max_number or terms"):
        make_problem(config, empty_split, 0, 0)


@given(st.text(), st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(any))
def test_split_of_never_returns_a_split_with_fraction_0(text, fractions):
    assert fractions[SPLITS.index(split_of(text, fractions))] > 0
