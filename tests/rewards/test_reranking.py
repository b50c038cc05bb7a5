"""Rewards for permutations: parsing, nDCG and completeness."""

import math

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
    ("2 > 1 > 3", None),
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
