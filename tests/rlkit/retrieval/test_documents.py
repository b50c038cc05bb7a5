"""Markers of passages in text that a prompt shows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.retrieval.documents import MARKER, Document, passage_text, without_markers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("as shown in [12]", "as shown in (12)"),
        ("[1][2] > [3]", "(1)(2) > (3)"),
        ("[ 4 ]", "(4)"),
        ("x[i] and [a1] and [1, 2]", "x[i] and [a1] and [1, 2]"),
        ("[[5]]", "[(5)]"),
    ],
)
def test_numbers_in_brackets_lose_their_brackets(text, expected):
    assert without_markers(text) == expected


@given(st.text(alphabet="[]()0123456789 a٣", max_size=40))
def test_no_marker_is_left(text):
    assert MARKER.search(without_markers(text)) is None


def test_passage_text_begins_with_the_title():
    assert passage_text(Document("a", "Title", "text")) == "Title: text"
    assert passage_text(Document("a", "", ": text")) == ": text"
