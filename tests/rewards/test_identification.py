"""Rewards for identifiers that a model writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.identification import hit

RELEVANT = ["sendfile.2", "splice.2"]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("sendfile.2", 1),
        ("  splice.2\n", 1),
        ("<think>read.2 or splice.2?</think>\nsplice.2", 1),
        ("read.2", 0),
        ("", 0),
        ("sendfile.2 splice.2", 0),
        ("sendfile.2\nsplice.2", 0),
        ("sendfile.2, splice.2", 0),
        ("The answer is sendfile.2", 0),
        ("sendfile", 0),
        ("sendfile.2.", 0),
        ("SENDFILE.2", 0),
        ("<think>sendfile.2", 0),
    ],
)
def test_only_the_bare_identifier_of_a_relevant_document_scores(completion, expected):
    assert hit(completion, RELEVANT) == expected


def test_query_without_a_relevant_document_scores_0_for_every_completion():
    for completion in ("", "sendfile.2"):
        assert hit(completion, []) == 0


@given(st.lists(st.sampled_from([*RELEVANT, "read.2", " ", "\n", ", ", "[1]", "It is ", "."]), max_size=4))
def test_hit_is_equality_with_a_relevant_identifier(pieces):
    completion = "".join(pieces)
    assert hit(completion, RELEVANT) == (completion.strip() in RELEVANT)
