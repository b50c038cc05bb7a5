"""Rewards for permutations: parsing, nDCG and completeness."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.reranking import ndcg, read_permutation, whole_list

CASES = [
    ("[2] > [1] > [3]", [1, 0, 2]),
    ("[2]>[1]>[3]", [1, 0, 2]),
    ("I compare [1] and [3].\n[3] > [1] > [2]", [2, 0, 1]),
    ("[1] > [2] > [3] is wrong, so:\n[3] > [2] > [1]", [2, 1, 0]),
    ("<think>[1] > [2]</think>[3] > [2]", [2, 1, 0]),
    ("[3] > [2]", [2, 1, 0]),  # missing candidates follow in their original order
    ("[3] > [3] > [1]", [2, 0, 1]),
    ("[9] > [0] > [2] > [1]", [1, 0, 2]),
    ("[2]", [1, 0, 2]),
    (" [2] \n", [1, 0, 2]),
    ("The best is [2].", None),
    ("[9] > [8]", None),
    # Answers that are nothing but a list of identifiers.
    ("2 > 1 > 3", [1, 0, 2]),
    ("3>2", [2, 1, 0]),
    ("[2], [1], [3]", [1, 0, 2]),
    ("[2] [1]", [1, 0, 2]),
    ("[2],[2],[1]", [1, 0, 2]),
    ("[2]\n[1]\n[3]", [1, 0, 2]),
    ("[3, 1, 2]", [2, 0, 1]),
    ("[3,1]", [2, 0, 1]),
    ("```json\n[3, 1, 2]\n```", [2, 0, 1]),
    ("```\n3 > 1\n```", [2, 0, 1]),
    ("3\n1\n\n2\n", [2, 0, 1]),
    ("<think>[1, 2]</think>\n[3, 1, 2]", [2, 0, 1]),
    ("<think>hm</think> 3 > 1", [2, 0, 1]),
    ("[2, 5]", None),  # 5 is not an identifier
    ("[0, 1, 2]", None),
    ("2 > 1 > 7", None),
    ("2019\n1", None),
    ("3", None),
    ("2, 1", None),
    ("1,2", None),
    ("3 1 2", None),
    ("2.1", None),
    ("[2.0, 1.0]", None),
    ("[-1, 2]", None),
    ('["a", 2]', None),
    ("[[2, 1]]", None),
    ("[2, 1", None),
    ("> 2 > 1", None),
    ("2 >> 1", None),
    ("1. [3]\n2. [1]", None),
    ("- 3\n- 1", None),
    ("The order is 2 > 1 > 3", None),
    ("Ranking: [2, 1, 3]", None),
    ("[2], [1] and [3]", None),
    ("2 > 1 > 3.", None),
    ("[1000000000] > [10000000002] > [3]", [2, 0, 1]),
    ("<think>[1] > [2] > [3]</think>", None),
    ("<think>[1] > [2] > [3]", None),
    ("[3] > [2]<think>[1] > [2] > [3]", [2, 1, 0]),
    ("", None),
    ("[" * 5000, None),
    ("[99999999999999999999999] > [2] > [1]", [1, 0, 2]),
]


@pytest.mark.parametrize(("completion", "order"), CASES)
def test_read_permutation(completion, order):
    assert read_permutation(completion, 3) == order


@given(st.permutations(range(7)))
def test_read_permutation_round_trips(order):
    completion = " > ".join(f"[{i + 1}]" for i in order)
    assert read_permutation(completion, 7) == list(order) and whole_list(completion, [0] * 7) == 1


@given(st.text(alphabet="[]> 0123456789\n"), st.integers(1, 9))
def test_read_permutation_is_complete_or_none(completion, n):
    order = read_permutation(completion, n)
    assert order is None or sorted(order) == list(range(n))
    assert ndcg(completion, [1] * n, [1] * n) == pytest.approx(float(order is not None))


@given(st.permutations(range(1, 7)), st.sampled_from([" > ", ">", "\n", "], [", "]\n[", ", "]))
def test_lists_of_all_forms_are_read(order, separator):
    text = separator.join(map(str, order))
    completion = text if separator in (" > ", ">", "\n") else f"[{text}]"
    assert read_permutation(completion, 6) == [i - 1 for i in order] and whole_list(completion, [0] * 6) == 1


PROSE = st.lists(
    st.sampled_from(["1", "2", "3", "[1]", "[2, 3]", ",", ">", " ", "\n", "is", ".", ":", "1.", "No"]),
    max_size=12,
).map("".join)


@given(PROSE)
def test_numbers_in_prose_are_not_read(text):
    """Only a chain of identifiers in brackets is read from a string with words."""
    has_words = re.search(r"[a-zA-Z.:]", text)
    has_chain = re.search(r"\]\s*>+\s*\[", text)
    if has_words and not has_chain:
        assert read_permutation(text, 3) is None and whole_list(text, [1, 1, 1]) == 0


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("<thinking>", "</thinking>"),
        ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"),
        ("◁think▷", "◁/think▷"),
        ("<|channel>thought", "<channel|>"),
    ],
)
@pytest.mark.parametrize("ranking", ["[2] > [1] > [3]", "[2, 1, 3]", "2 > 1 > 3", "2\n1\n3", "[2], [1], [3]"])
def test_rankings_in_thoughts_are_not_read(opening, closing, ranking):
    assert read_permutation(f"{opening}{ranking}", 3) is None
    assert read_permutation(f"{opening} maybe\n{ranking}\n", 3) is None
    assert read_permutation(f"{opening}{ranking}{closing}", 3) is None
    assert read_permutation(f"{opening}[3] > [1]{closing}{ranking}", 3) == [1, 0, 2]
    assert read_permutation(f"{ranking}{opening}[3] > [1]", 3) == [1, 0, 2]


def test_reading_takes_linear_time():
    """A quadratic parser would take minutes on these strings."""
    for text in (
        "[1] " * 100_000 + "x",
        "[" + " " * 400_000,
        "1\n" * 200_000 + "x",
        "[1]" + "\n" * 400_000 + "x",
    ):
        assert read_permutation(text, 3) is None
    assert read_permutation("[1" * 200_000 + "]", 3) is None
    assert read_permutation("```" * 100_000 + "\n", 3) is None


def test_no_candidates_have_no_ranking():
    for completion in ("", "[1]", "[1] > [2]", "[]", "none"):
        assert read_permutation(completion, 0) is None
        assert ndcg(completion, [], [1]) == whole_list(completion, []) == 0


def test_ndcg_of_small_rankings():
    assert ndcg("[2] > [1]", [0, 3], [3]) == 1
    assert ndcg("[1] > [2]", [0, 3], [3]) == pytest.approx(1 / math.log2(3))
    # A better document that is not a candidate counts in the ideal ranking.
    assert ndcg("[2] > [1]", [0, 1], [2, 1]) == pytest.approx(1 / (2 + 1 / math.log2(3)))
    assert ndcg("no list", [0, 3], [3]) == 0
    assert ndcg("[1] > [2]", [0, 0], [3]) == 0


@pytest.mark.parametrize(
    "completion", ["[1] > [2]", "[1] > [2] > [2] > [3]", "[1] > [2] > [3] > [4]", "[1]", ""]
)
def test_whole_list_requires_each_candidate_exactly_once(completion):
    assert whole_list(completion, [0, 0, 0]) == 0
