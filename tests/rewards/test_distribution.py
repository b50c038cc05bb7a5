"""Rewards for distributions: parsing of answers, and comparison in integer hundredths."""

import pickle
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.distribution import (
    answer_format,
    distribution,
    parse_distribution,
    parsed,
    right_length,
    total_variation,
)

TRUTH = [0.1, 0.9]


@pytest.mark.parametrize(
    "completion",
    [
        "ANSWER\n[0.1, 0.9]",
        "ANSWER: [.1, 0.9]",
        "ANSWER [.1,.9]",
        "ANSWER [ 0.1, 0.9 ]",
        "**ANSWER** [0.1,0.9]",
        "**Answer:** [0.1, 0.9]",
        "## Answer\n\n[0.1, 0.9]",
        "\\boxed{[0.1, 0.9]}",
        "ANSWER: $\\boxed{\\left[0.1,\\, 0.9\\right]}$",
        "answer: \\[0.1, 0.9\\]",
        "\\[ [0.1, 0.9] \\]",
        "ANSWER [10%, 90%]",
        "ANSWER [10\\%, 90 %]",
        "ANSWER [1/10, 9/10]",
        "ANSWER [\\frac{1}{10}, \\frac{9}{10}]",
        "[0.1, 0.9]",
        "P(a)=[0.3, 0.7], so it is [0.1, 0.9].",
        "P(c|do(b=1)) = [0.1, 0.9]",
        "The answer is [0.1, 0.9]. Check: P(a)=[0.3, 0.7]",
        "The answer is not obvious: P(a)=[0.3, 0.7], which leads to [0.1, 0.9]",
        "P(a)=[0.3, 0.7]\nANSWER\n[0.1, 0.9]\nbecause P(b) = [0.2, 0.8]",
        "ANSWER: [0.5, 0.5]\nWait.\nANSWER: [0.1, 0.9]",
        "ANSWER [0.1, 0.9]\nThat is my ANSWER.",
        "[0.1, 0.9] is my final answer",
        "v3 lies in [0, 1) here, so [0.1, 0.9]",
    ],
)
def test_lenient_parser_accepts_common_formats(completion):
    assert parse_distribution(completion) == pytest.approx(TRUTH)
    assert distribution(completion, TRUTH) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "ANSWER",
        "0.1, 0.9",
        "[]",
        "[,]",
        "ANSWER [nan, 0.9]",
        "ANSWER [inf, -inf]",
        "ANSWER [1e400, 0.9]",
        "ANSWER [٠.١, ٠.٩]",
        "ANSWER [0.1 0.9]",
        "ANSWER [1.2.3, 0.9]",
        "ANSWER [1/0, 0.9]",
        "ANSWER [[0.1, 0.9]]",
        "ANSWER [[0.1, 0.9], [0.1, 0.9], [0.1, 0.9]]",
        "ANSWER [__import__('os').getcwd(), 0.9]",
        "P(a) = [0.1, 0.9]\nANSWER: unknown",
        "P(a) = [0.1, 0.9]\nANSWER: [p, q] = [0.1, 0.9]",
        "ANSWER [0.1, 0.9]\nNo: ANSWER [nan, 0.9]",
    ],
)
def test_unparsable_answers_score_0(completion):
    assert parse_distribution(completion) is None
    assert parsed(completion) == right_length(completion, TRUTH) == distribution(completion, TRUTH) == 0
    assert answer_format(completion, TRUTH) == total_variation(completion, TRUTH) == 0


def test_lenient_parser_selects_the_first_or_last_answer():
    text = "ANSWER: [0.5, 0.5]\nANSWER: [0.1, 0.9]"
    assert parse_distribution(text, which="first") == [0.5, 0.5]
    assert parse_distribution(text, which="last") == [0.1, 0.9]
    assert parse_distribution("[0.5, 0.5] [0.1, 0.9]", which="first") == [0.5, 0.5]


def test_only_the_lenient_parser_ignores_thoughts():
    for text in ("<think>ANSWER [0.5, 0.5]", "<think>ANSWER [0.5, 0.5]</think>"):
        assert parse_distribution(text) is None
        assert parse_distribution(text, "official") == [0.5, 0.5]
    text = "<think>ANSWER [0.5, 0.5]</think>ANSWER [0.1, 0.9]<think>ANSWER [0.3, 0.7]"
    assert parse_distribution(text) == parse_distribution(text, which="first") == [0.1, 0.9]


def test_official_parser_accepts_the_format_of_the_release():
    assert parse_distribution("so ANSWER\n[0.49, 0.51] ok", "official") == [0.49, 0.51]
    assert parse_distribution("ANSWER [-4.0, 5.0]", "official") == [-4.0, 5.0]
    assert parse_distribution("ANSWER [1.0]", "official") == [1.0]
    text = "ANSWER [0.2, 0.8] ANSWER [0.1, 0.9]"
    assert parse_distribution(text, "official") == [0.2, 0.8]
    assert parse_distribution(text, "official", which="last") == [0.1, 0.9]


@pytest.mark.parametrize(
    "completion",
    [
        "**ANSWER** [0.1, 0.9]",
        "ANSWER: [0.1, 0.9]",
        "ANSWER [.1,.9]",
        "ANSWER [ 0.1, 0.9 ]",
        "ANSWER [1.2.3, 0.9]",
        "ANSWER [1.2.3, 0.9] ANSWER [0.1, 0.9]",
        "[0.1, 0.9]",
        "ANSWER [٠.١, ٠.٩]",
        "ANSWER [" + "1" * 10**6 + ", 0.9]",
    ],
)
def test_official_parser_rejects_what_the_release_rejects(completion):
    assert parse_distribution(completion, "official") is None


# Each is about a megabyte. A parser that backtracks would take minutes or longer.
HOSTILE = [
    "[" * 10**6,
    "]" * 10**6,
    "[" * 5 * 10**5 + "]" * 5 * 10**5,
    "[]" * 5 * 10**5,
    "ANSWER [" + "1" * 10**6 + ", 0.9]",
    "ANSWER [0." + "1" * 10**6 + ", 0.9]",
    "ANSWER [" + "1, " * 3 * 10**5,
    "ANSWER [" + "1, " * 3 * 10**5 + "x]",
    "ANSWER" + " " * 10**6 + "x [",
    "ANSWER " * 10**5 + "]",
    "answer is " * 10**5 + "[",
    "Answer" + "*" * 10**6 + "[x]",
    "\\boxed{" * 10**5 + "[x]",
    "[" + "\\frac{" * 10**5 + "]",
    "[0.1" + " " * 10**6 + "x]",
    "[0.1" + " /" * 5 * 10**5 + "]",
]


@pytest.mark.parametrize("parser", ["lenient", "official"])
def test_hostile_answers_score_0_in_linear_time(parser):
    # This takes a second or two. In quadratic time it would take hours.
    for text in HOSTILE:
        for position in ("first", "last"):
            assert distribution(text, TRUTH, parser=parser, which=position) == 0


@given(st.text(alphabet="[]0123456789.,/%-+ \n\\{}$*:eAaNnSsWwEeRrboxedfracisP()=|٣", max_size=80))
def test_parsers_return_finite_numbers_or_none(text):
    for parser in ("lenient", "official"):
        for position in ("first", "last"):
            answer = parse_distribution(text, parser, position)
            assert answer is None or all(abs(p) < 1e40 for p in answer)
            assert distribution(text, TRUTH, parser=parser, which=position) in (0.0, 1.0)
            assert 0 <= total_variation(text, TRUTH, parser=parser, which=position) <= 1


def test_weighted_sum_of_rewards_has_four_values():
    def score(completion):
        return (
            0.1 * parsed(completion)
            + 0.1 * right_length(completion, TRUTH)
            + 0.8 * distribution(completion, TRUTH)
        )

    assert score("nothing") == 0
    assert score("ANSWER [1.0]") == pytest.approx(0.1)
    assert score("ANSWER [0.5, 0.5]") == pytest.approx(0.2)
    assert score("ANSWER [5.0, -4.0]") == pytest.approx(0.2)
    assert score("ANSWER [0.1, 0.9]") == pytest.approx(1.0)


def test_distribution_compares_adjacent_answers_in_hundredths():
    accepted_by_floats = 0
    for a in range(100):
        truth, off = [a / 100, (100 - a) / 100], [(a + 1) / 100, (99 - a) / 100]
        text = f"ANSWER {off}"
        assert distribution(text, truth) == 1.0
        assert distribution(text, truth, strict=True) == 0.0
        assert distribution(f"ANSWER {truth}", truth, strict=True) == 1.0
        accepted_by_floats += 0.5 * sum(abs(p - q) for p, q in zip(off, truth, strict=True)) < 0.01
    assert (
        accepted_by_floats == 24
    )  # a comparison in floats accepts these by rounding error; 0 would be right


def test_rounded_answers_need_not_sum_to_exactly_1():
    assert distribution("[0.49, 0.50]", [0.49, 0.51], strict=True) == 1.0
    assert distribution("[0.33, 0.33, 0.33]", [0.33, 0.33, 0.33]) == 1.0
    assert distribution("[1/3, 1/3, 1/3]", [0.33, 0.33, 0.33]) == 1.0


@pytest.mark.parametrize("completion", ["[0.48, 0.50]", "[1.01, -0.01]", "[0.4, 0.4]", "[0.0, 0.0]"])
def test_lists_that_are_not_distributions_are_never_correct(completion):
    for truth in ([0.49, 0.51], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0]):
        assert distribution(completion, truth, tolerance=0.99) == 0.0
        assert total_variation(completion, truth) == 0.0
    assert answer_format(completion, [0.5, 0.5]) == 1.0


def test_answers_with_negative_entries_are_never_correct():
    assert distribution("[-0.01, 0.51, 0.50]", [0.0, 0.5, 0.5], tolerance=0.1) == 0.0
    assert distribution("[0.01, 0.50, 0.49]", [0.0, 0.5, 0.5], tolerance=0.1) == 1.0


def test_tolerance_is_inclusive_unless_strict():
    assert distribution("[0.13, 0.87]", TRUTH, tolerance=0.03) == 1.0
    assert distribution("[0.13, 0.87]", TRUTH, tolerance=0.03, strict=True) == 0.0
    assert distribution("[0.14, 0.86]", TRUTH, tolerance=0.03) == 0.0
    assert total_variation("[0.14, 0.86]", TRUTH) == pytest.approx(0.96)


@given(st.integers(0, 100), st.integers(0, 100))
def test_total_variation_of_binary_answers(a, b):
    truth, text = [b / 100, 1 - b / 100], f"[{a / 100}, {(100 - a) / 100}]"
    assert total_variation(text, truth) == pytest.approx(1 - abs(a - b) / 100)
    assert distribution(text, truth) == float(abs(a - b) <= 1)


def test_rewards_with_arguments_can_be_pickled():
    reward = pickle.loads(pickle.dumps(partial(distribution, tolerance=0.02, parser="official")))
    assert reward("ANSWER [0.12, 0.88]", TRUTH) == 1.0
