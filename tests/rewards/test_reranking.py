"""What is read as a permutation, and that nothing else scores."""

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
    ("[3] > [2]", [2, 1, 0]),  # what is missing follows as it was given
    ("[3] > [3] > [1]", [2, 0, 1]),
    ("[9] > [0] > [2] > [1]", [1, 0, 2]),
    ("[2]", [1, 0, 2]),
    (" [2] \n", [1, 0, 2]),
    ("The best is [2].", None),
    ("[9] > [8]", None),
    ("2 > 1 > 3", None),
    ("<think>[1] > [2] > [3]</think>", None),
    ("", None),
    ("[" * 5000, None),
    ("[99999999999999999999999] > [2] > [1]", [1, 0, 2]),
]


@pytest.mark.parametrize(("text", "order"), CASES)
def test_what_is_read(text, order):
    assert read_permutation(text, 3) == order


@given(st.permutations(range(7)))
def test_what_is_written_is_read(order):
    text = " > ".join(f"[{i + 1}]" for i in order)
    assert read_permutation(text, 7) == list(order) and whole_list(text, [0] * 7) == 1


@given(st.text(alphabet="[]> 0123456789\n"), st.integers(1, 9))
def test_it_is_always_all_of_them_or_nothing(text, n):
    order = read_permutation(text, n)
    assert order is None or sorted(order) == list(range(n))
    assert ndcg(text, [1] * n, [1] * n) == pytest.approx(float(order is not None))


def test_ndcg_by_hand():
    assert ndcg("[2] > [1]", [0, 3], [3]) == 1
    assert ndcg("[1] > [2]", [0, 3], [3]) == pytest.approx(1 / math.log2(3))
    # A better document that is no candidate counts in the ideal.
    assert ndcg("[2] > [1]", [0, 1], [2, 1]) == pytest.approx(1 / (2 + 1 / math.log2(3)))
    assert ndcg("no list", [0, 3], [3]) == 0
    assert ndcg("[1] > [2]", [0, 0], [3]) == 0


@pytest.mark.parametrize("text", ["[1] > [2]", "[1] > [2] > [2] > [3]", "[1] > [2] > [3] > [4]", "[1]", ""])
def test_a_list_that_is_not_whole(text):
    assert whole_list(text, [0, 0, 0]) == 0
