"""Contents of pairs of tags."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.tags import tag_contents


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("<query>a</query> and <query> b\n</query>", ["a", " b\n"]),
        ("<query>a<query>b</query>", ["a<query>b"]),  # a pair begins at the first opening tag
        ("</query><query></query></query>", [""]),
        ("<query>a</query><query>b", ["a"]),
        ("<Query>a</Query>", []),
        ("", []),
    ],
)
def test_tag_contents(text, contents):
    assert tag_contents(text, "query") == contents


@given(st.lists(st.sampled_from(["<a>", "</a>", "<b>", "</b>", "<", "/a>", "x", "\n"])).map("".join))
def test_tag_contents_are_those_of_a_lazy_regular_expression(text):
    assert tag_contents(text, "a") == re.findall("<a>(.*?)</a>", text, re.DOTALL)
