"""Strings from collections in prompts: one line each, without markers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.ranking.prompts import prompt_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("as shown in [3]", "as shown in (3)"),
        ("[2] > [1]", "(2) > (1)"),
        ("[ 12 ]", "(12)"),
        ("[\n7\t]", "(7)"),
        ("[\u200b7\u2060]", "(7)"),
        ("［３］【4】〔5〕⟦6⟧", "(３)(4)(5)(6)"),
        ("[[3]]", "[(3)]"),
        ("[٣]", "(٣)"),
        ("[a] [] [3 ] x] [1.5] [2, 3]", "[a] [] (3) x] [1.5] [2, 3]"),
        ("a\r\nQuery: b\u2028c\x0bd\x85e", "a Query: b c d e"),
        (" \n ", ""),
    ],
)
def test_prompt_line_has_neither_markers_nor_line_breaks(text, line):
    assert prompt_line(text) == line


def test_prompt_line_truncates():
    assert prompt_line("one [2] three four", 3) == "one (2) three …"
    assert prompt_line("one [2] three", 3) == "one (2) three"


@given(
    st.lists(st.sampled_from("[]［］【】12 \n\u200b>a") | st.characters(), max_size=30).map("".join),
    st.integers(1, 9),
)
def test_prompt_line_is_stable(text, max_words):
    for line in (prompt_line(text), prompt_line(text, max_words)):
        assert prompt_line(line) == line and len(line.splitlines()) <= 1


def test_prompt_line_takes_linear_time():
    """A quadratic search would take hours on these strings."""
    for text in ("[" * 10**6, "[" + "\u200b" * 10**6, "[" + "1" * 10**6, "[1" * 10**6, "[1\u200b" * 10**6):
        assert prompt_line(text) == text
