"""Documents that a simulator writes: how they are read, and when they are what was asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.simulation import form, holds_answer, obeys, split_documents

TWO = 'Doc 1(Title: "Paris") It lies on the Seine.\nDoc 2: A city in France.'


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        (TWO, [("Paris", "It lies on the Seine."), ("", "A city in France.")]),
        ("Doc 1: a\n\n\nDoc 2: b\n\n b goes on", [("", "a"), ("", "b b goes on")]),
        ("Document 1: a", [("", "a")]),
        ("Doc 1(Title: Paris) a (b) c", [("Paris", "a (b) c")]),
        ('Doc 1(Title: "A (film)") a', [("A (film)", "a")]),
        ("Here you are:\nDoc 1: a", [("", "a")]),
        ("Doc 1: a\nDoc 2:\nDoc 3: c", [("", "a"), ("", "c")]),
        ("as Doc 1: said", []),
        ("", []),
        ("nothing", []),
    ],
)
def test_split_documents(text, documents):
    assert split_documents(text) == documents


@given(
    st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=9), min_size=1, max_size=7)
)
def test_what_is_written_is_read(texts):
    written = "\n".join(f"Doc {i}: {text}" for i, text in enumerate(texts, 1))
    assert [text for _, text in split_documents(written)] == texts
    assert form(written, len(texts)) == 1
    assert form(written, len(texts) + 1) == 0


def test_nothing_stands_before_the_documents():
    assert form(f"Sure!\n{TWO}", 2) == 0
    assert form(TWO, 2) == 1 and form(TWO, 1) == 0


def test_the_answer_stands_as_whole_words():
    assert holds_answer("It is on the Seine.", ["Rhine", "Seine"])
    assert not holds_answer("the Seinemaritime", ["Seine"])


@pytest.mark.parametrize(
    ("text", "holds", "expected"),
    [
        (TWO, True, 1),
        (TWO, False, 0),
        (TWO.replace("Seine", "Loire"), False, 1),
        (TWO.replace("Seine", "Loire"), True, 0),
        ("It lies on the Seine.", True, 0),  # no document
        (f"{TWO}\nDoc 3: more", True, 0),  # one too many
        ('Doc 1(Title: "Seine") A river.\nDoc 2: b', True, 1),  # the title is part of it
    ],
)
def test_obeys(text, holds, expected):
    assert obeys(text, ["Seine"], 2, holds) == expected
