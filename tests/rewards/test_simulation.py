"""Rewards for a simulated search engine: parsing of documents, their form, and their answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.simulation import form, holds_answer, obeys, split_documents

TWO_DOCUMENTS = 'Doc 1(Title: "Paris") It lies on the Seine.\nDoc 2: A city in France.'


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        (TWO_DOCUMENTS, [("Paris", "It lies on the Seine."), ("", "A city in France.")]),
        ("Doc 1: a\n\n\nDoc 2: b\n\n b continues", [("", "a"), ("", "b b continues")]),
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
def test_split_documents_round_trips(bodies):
    completion = "\n".join(f"Doc {i}: {body}" for i, body in enumerate(bodies, 1))
    assert [body for _, body in split_documents(completion)] == bodies
    assert form(completion, len(bodies)) == 1
    assert form(completion, len(bodies) + 1) == 0


def test_form_requires_the_number_of_documents_and_nothing_before_them():
    assert form(f"Sure!\n{TWO_DOCUMENTS}", 2) == 0
    assert form(TWO_DOCUMENTS, 2) == 1 and form(TWO_DOCUMENTS, 1) == 0


def test_documents_in_a_thought_do_not_count():
    thought = "<think>\nDoc 1: the Rhine\n</think>\n"
    assert split_documents(thought + TWO_DOCUMENTS) == split_documents(TWO_DOCUMENTS)
    assert form(thought + TWO_DOCUMENTS, 2) == obeys(thought + TWO_DOCUMENTS, ["Seine"], 2, True) == 1
    assert form(f"<think>\n{TWO_DOCUMENTS}", 2) == 0


def test_holds_answer_matches_whole_words():
    assert holds_answer("It is on the Seine.", ["Rhine", "Seine"])
    assert not holds_answer("the Seinemaritime", ["Seine"])


@pytest.mark.parametrize(
    ("text", "holds", "expected"),
    [
        (TWO_DOCUMENTS, True, 1),
        (TWO_DOCUMENTS, False, 0),
        (TWO_DOCUMENTS.replace("Seine", "Loire"), False, 1),
        (TWO_DOCUMENTS.replace("Seine", "Loire"), True, 0),
        ("It lies on the Seine.", True, 0),  # not in the form of a document
        (f"{TWO_DOCUMENTS}\nDoc 3: more", True, 0),  # one document too many
        ('Doc 1(Title: "Seine") A river.\nDoc 2: b', True, 1),  # the title counts, too
    ],
)
def test_obeys(text, holds, expected):
    assert obeys(text, ["Seine"], 2, holds) == expected
