r"""Rewards for an answer in `\boxed{}`: extraction, comparison, and time limits on hostile input."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.rewards.boxed import box_format, correct, is_readable, last_box, read_integer
from rlkit.scoring import RewardRunner


@pytest.mark.parametrize(
    ("completion", "content"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1}, no, \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{3 + \boxed{7}}", r"3 + \boxed{7}"),
        (r"the set {1, 2 and \boxed{3}", "3"),
        (r"\boxed{12} then \boxed{13", "12"),
        (r"\boxed{12 and then \boxed{13}", "13"),
        (r"\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed 5.", "5"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed", None),
        ("42", None),
        ("", None),
    ],
)
def test_last_box_is_the_last_closed_one(completion, content):
    assert last_box(completion) == content


EQUIVALENT = [
    ("42", "42"),
    ("42", "$42$"),
    ("42", "42."),
    ("42", r"\left(42\right)"),
    ("1000", "1,000"),
    ("1000", "1{,}000"),
    ("1000", r"1\,000"),
    ("18", r"\$18"),
    ("5", "x=5"),
    ("x=5", "5"),
    ("5", "= 5"),
    ("5", r"x = \frac{10}{2} = 5"),
    ("5", "f(2) = 5"),
    ("5", r"5\text{ cm}"),
    ("90", r"90^\circ"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{3}", "0.333333"),
    ("0.5", r"50\%"),
    (r"50\%", "50"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("1, 2", "2,1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"(1,2)\cup(3,4)", r"(3,4)\cup(1,2)"),
    ("x=1,y=2", "y=2,x=1"),
    (r"\text{Monday}", "monday"),
    ("A", r"\text{(A)}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]

DIFFERENT = [
    ("42", "-42"),
    ("1", "1, 2"),
    ("1, 2", "1"),
    ("1,2", "1,2,3"),
    ("12", "1 2"),
    ("12", r"1\,2"),
    ("5", r"\pm 5"),
    ("5", r"5 \text{ or } 6"),
    ("5", r"6 \text{ or } x=5"),
    ("5", "x=3, x=5"),
    ("5", "2+2=5"),
    ("5", "x=3=5"),
    ("7", r"7\text{ is not the answer}"),
    ("5", "x != 5"),
    ("5", r"x \neq 5"),
    ("5", r"x \not= 5"),
    ("5", "x < 5"),
    ("5", r"x \leq 5"),
    ("x=5", "y=5"),
    ("0.5", r"0.5\%"),
    ("0.5", "50"),
    ("0.1", "0,1"),
    (r"\frac{1}{3}", "0.33"),
    (r"\pi", "3.14"),
    (r"\frac{a}{b}", r"\frac{b}{a}"),
    (r"1\frac{1}{2}", r"\frac{11}{2}"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "2,1"),
    ("(1,2)", "[1,2]"),
    (r"(1,2]", "[1,2)"),
    (r"\{1,2\}", "(1,2)"),
    ("x=1,y=2", "x=2,y=1"),
    (r"\text{Monday}", r"\text{Tuesday}"),
    ("east", "seat"),
    ("CAB", "ABC"),
    ("A", "B"),
    ("0", r"\frac{1}{10^9}"),
    (r"\infty", r"-\infty"),
    ("7", "7 + C"),
    ("5050", r"\sum_{k=1}^{100} k"),
    ("7", r"\int_0^7 dx"),
    ("7", r"\text{seven}"),
    ("7", ""),
    ("7", "."),
    ("7", r"\frac{"),
    ("7", r"]] qwertz \\ \begin{x} ☃"),
    ("7", r"3 + \boxed{7}"),
    ("7", "6 $7$"),
    ("7", "? $7$"),
    ("7", "the final answer is 7"),
    ("7", r"6 \quad 7"),
    ("7", r"6 \\ 7"),
]


@pytest.mark.parametrize(("answer", "text"), EQUIVALENT)
def test_correct_accepts_equivalent_answers(answer, text):
    assert correct(rf"It is \boxed{{{text}}}.", answer) == 1.0


@pytest.mark.parametrize(("answer", "text"), DIFFERENT)
def test_correct_rejects_different_answers(answer, text):
    assert correct(rf"It is \boxed{{{text}}}.", answer) == 0.0


def test_correct_reads_only_the_last_box():
    assert correct(r"\boxed{41} ... \boxed{42}", "42") == 1.0
    assert correct(r"\boxed{42} ... \boxed{41}", "42") == 0.0
    assert correct(r"\boxed{42} and \boxed{}", "42") == 0.0
    assert correct("42", "42") == 0.0


@pytest.mark.parametrize("text", ["7 + 35", "x = 42", "42.5", r"\frac{84}{2}", "42 or 43", "", "4 2", "42_8"])
def test_integer_comparison_requires_an_integer_literal(text):
    assert correct(rf"\boxed{{{text}}}", "42", "integer") == 0.0
    assert correct(r"\boxed{42}", "42", "integer") == correct(r"\boxed{ 42. }", "42", "integer") == 1.0


@pytest.mark.parametrize(
    "text", ["42.00", r"42\%", r"42\text{ dollars}", r"\$42", "42 apples", r"\text{42}", "**42**", "+42"]
)
def test_integer_comparison_ignores_units_and_zeros(text):
    assert correct(rf"\boxed{{{text}}}", "42", "integer") == correct(r"\boxed{42}", text, "integer") == 1.0


@settings(max_examples=300, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_integers_are_compared_exactly(a, b):
    assert read_integer(f"{a:,}") == a
    for comparison in ("math", "integer"):
        assert correct(rf"\boxed{{{a}}}", str(b), comparison) == (a == b)
        assert correct(rf"\boxed{{{a:,}}}", str(a), comparison) == 1.0


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="\\boxed{}12 a", max_size=60))
def test_rewards_of_any_string_are_0_or_1(text):
    assert correct(text, "12", "integer") in (0.0, 1.0)
    assert box_format(text) in (0.0, 1.0)
    assert last_box(text + r"\boxed{12}") == "12"


def test_read_integer_of_a_negative_percentage():
    assert read_integer(r"-5\%") == -5


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        (r"<think>\boxed{1}</think> so \boxed{12}", 1.0),
        (r"<think>\boxed{12}", 0.0),
        (r"7 + 5 = 12, so \boxed{12}.", 1.0),
        (r"\boxed{12}" + " " * 50, 1.0),
        (r"\boxed{12} " + "x" * 20, 1.0),
        (r"\boxed{12} " + "x" * 21, 0.0),
        (r"\boxed{12} \boxed{12}", 0.0),
        (r"\boxed{\boxed{12}}", 0.0),
        (r"\boxed{12} \boxed{", 0.0),
        (r"\boxed{ }", 0.0),
        ("12", 0.0),
        ("", 0.0),
    ],
)
def test_box_format(completion, value):
    assert box_format(completion) == value


HUGE = [
    r"9^{9^{9^{9}}}",
    r"9^{999999}",
    r"(10^{10})!",
    r"3!!!",
    r"\binom{1000000}{500000}",
    r"\sum_{k=1}^{1000000} k^k",
    r"\prod_{k=1}^{100000} k",
    r"\int_0^\infty x^{x^x} dx",
    r"(1+x)^{5000}",
    r"(a+b+c+d+e)^{50}",
    r"10^{-999999999}",
    r"7^{7^{7^7}} \mod 10",
    r"\exp(10^{12})",
    "(" * 20 + "1" + ")" * 20,
    "1+" * 1000 + "1",
]


@pytest.mark.parametrize("text", HUGE)
def test_correct_rejects_huge_expressions(text):
    assert correct(rf"\boxed{{{text}}}", "5") == correct(rf"\boxed{{{text}}}", r"\sqrt{x}") == 0.0


def cpu_time(n, part):
    times = []
    for _ in range(3):
        start = time.process_time()
        correct(part * n + r"\boxed{1}" + "}" * n, "7")
        correct(r"\boxed{" + part * n + "}", r"\text{seven}")
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("part", [r"\boxed{", "\\", "{", r"\boxed{1} ", "1 ", "1,", "~", "=", "((", "}"])
def test_correct_takes_linear_time(part):
    assert cpu_time(40_000, part) < max(20 * cpu_time(5_000, part), 0.1)


def test_correct_rejects_huge_expressions_in_a_reward_process():
    rows = [{"completion": rf"\boxed{{{text}}}", "answer": "5"} for text in (HUGE[0], "5", r"\frac{10}{2}")]
    with RewardRunner({"correct": correct}, time_limit=60) as runner:
        scores = runner(rows, group_size=1)
    assert scores.invalid == [None] * 3
    assert scores.values[:, 0].tolist() == [0.0, 1.0, 1.0]


def test_correct_works_in_another_thread():
    rewards = []
    cases = [(r"\frac{1}{2}", "0.5"), (r"\frac{1}{2}", "0.6"), (HUGE[0], "5")]
    thread = threading.Thread(
        target=lambda: rewards.extend(correct(rf"\boxed{{{text}}}", answer) for text, answer in cases)
    )
    thread.start()
    thread.join(60)
    assert rewards == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (r"<think> maybe \boxed{42} hmm", 0.0),
        (r"<think> \boxed{41}? </think> \boxed{42}", 1.0),
        (r"\boxed{41}? </think> It is \boxed{42}", 1.0),
        (r"<think> \boxed{42} </think> It is 42.", 0.0),
    ],
)
def test_correct_reads_what_follows_the_thoughts(completion, reward):
    assert correct(completion, "42") == correct(completion, "42", "integer") == reward


@pytest.mark.parametrize(
    "answer", ["42", r"\frac{1}{2}", "x=5", "(1,2)", r"\text{Monday}", "1, 2", r"2^{2020}"]
)
def test_is_readable_accepts_answers_that_equal_themselves(answer):
    assert is_readable(answer)


@pytest.mark.parametrize(
    "answer", ["", ".", r"\frac{", HUGE[0], r"\begin{x}", r"\frac{0}{0}", "x+" * 2000 + "x"]
)
def test_is_readable_rejects_answers_that_cannot_be_compared(answer):
    assert not is_readable(answer)
