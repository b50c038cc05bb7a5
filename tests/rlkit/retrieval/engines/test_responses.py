"""Responses of search servers: every form of a document, and malformed ones."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.retrieval.documents import Document, Result
from rlkit.retrieval.engines.responses import (
    RemoteError,
    deserialize_result,
    parse_response,
    read_response,
    serialize_result,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(
            st.sampled_from(["result", "document", "contents", "title", "text", "id", "score", "x"]),
            values,
            max_size=4,
        )
    ),
    max_leaves=20,
)


def parse(*items, k=5):
    (result,) = parse_response({"result": [list(items)]}, 1, k)
    return result


def fields(*items):
    return [(document.title, document.text) for document in parse(*items).documents]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b"[]", "no list"),
        (b"null", "no list"),
        (b'{"result": {}}', "no list"),
        (b'{"result": [[], []]}', "2 results for 1"),
    ],
)
def test_malformed_response_is_an_error_of_all_its_queries(content, message):
    with pytest.raises(RemoteError, match=message) as raised:
        read_response(content, 1, 3)
    assert raised.value.may_be_one_query and not raised.value.may_recover


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        ([{"document": {"id": "1"}}], "has no text"),
        ([{"document": None}], "has no text"),
        ([{"contents": None, "text": None}], "has no text"),
        ([{"contents": 7}], "has no text"),
        ([7], "has no text"),
        ([[]], "has no text"),
        (None, "not a list of documents"),
        ({"error": "the search failed"}, "the search failed"),
        ("text", "not a list of documents"),
    ],
)
def test_malformed_ranking_is_an_error_of_its_query_alone(ranking, message):
    before, malformed, after = parse_response({"result": [["a"], ranking, ["b"]]}, 3, 5)
    assert message in malformed.error and not malformed.documents
    assert before.error is None and after.error is None and before.documents and after.documents


def test_documents_are_nested_or_bare_objects_or_strings():
    result = parse({"document": "plain"}, {"contents": '"T"\nx'}, "text")
    assert [(d.title, d.text) for d in result.documents] == [("", "plain"), ("T", "x"), ("", "text")]
    assert result.scores == () and len({d.id for d in result.documents}) == 3


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"contents": '"Velmora"\nIt works.'}, ("Velmora", "It works.")),
        ({"title": "Velmora", "text": "It works."}, ("Velmora", "It works.")),
        (
            {"title": "Velmora", "text": "It works.", "contents": "Velmora\nIt works."},
            ("Velmora", "It works."),
        ),
        (
            {"title": "Velmora", "text": "It works.", "contents": '"Velmora"\nIt works.'},
            ("Velmora", "It works."),
        ),
        ({"title": "Velmora", "text": "It works.", "contents": "It works."}, ("Velmora", "It works.")),
        ({"title": "Other", "contents": '"Velmora"\nIt works.'}, ("Velmora", "It works.")),
        ({"title": "It works.", "text": "", "contents": "It works."}, ("", "It works.")),
        ({"title": "Velmora", "contents": '""\nIt works.'}, ("Velmora", "It works.")),
        ({"title": "Velmora", "text": "It works.", "contents": None}, ("Velmora", "It works.")),
        ({"title": "Velmora", "text": "It works.", "contents": ""}, ("Velmora", "It works.")),
        ({"title": None, "text": "It works."}, ("", "It works.")),
        ({"title": ["x"], "text": "It works."}, ("", "It works.")),
        ({"text": "a \ud800 b", "title": "\udfff"}, ("?", "a ? b")),
        ({"text": ""}, ("", "")),
    ],
)
def test_title_and_text_of_a_document(document, expected):
    assert fields({"document": document, "score": 1.0}) == fields(document) == [expected]


@pytest.mark.parametrize(
    ("value", "expected"), [(4, "4"), ("a", "a"), (1.5, "1.5"), (True, "True"), ("\ud800", "?")]
)
def test_id_is_any_scalar(value, expected):
    assert parse({"text": "x", "id": value}).documents[0].id == expected


@pytest.mark.parametrize("value", [None, "", [], {"a": 1}])
def test_document_without_id_gets_one_from_its_content(value):
    documents = parse(
        {"contents": "x", "id": value}, {"contents": "y", "id": value}, {"contents": "x"}
    ).documents
    assert documents[0].id == documents[2].id != documents[1].id and documents[0].id


def test_documents_without_ids_that_differ_in_the_title_have_different_ids():
    first, second, same = parse(
        {"title": "Paris", "text": "See also"},
        {"title": "Lyon", "text": "See also"},
        {"contents": '"Paris"\nSee also'},
    ).documents
    assert first.id == same.id != second.id


@pytest.mark.parametrize(
    ("score", "expected"),
    [(2, (2.0,)), ("0.5", (0.5,)), (-1.5, (-1.5,))]
    + [(value, ()) for value in (None, "high", True, [], {}, float("nan"), float("inf"), "nan", 10**400)],
)
def test_scores_are_finite_numbers_or_missing(score, expected):
    assert parse({"document": "a", "score": score}).scores == expected


def test_documents_beyond_k_are_dropped():
    result = parse({"title": "T", "text": "x", "id": 4}, "b", {"malformed": 1}, k=2)
    assert result.error is None
    assert result.documents == (Document("4", "T", "x"), Document(result.documents[1].id, "", "b"))


@given(VALUES, st.integers(0, 3), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_any_json_gives_a_result_per_query_or_a_remote_error(value, num_queries, k):
    for response in (value, {"result": value}, {"result": [value] * num_queries}):
        try:
            results = read_response(json.dumps(response).encode(), num_queries, k)
        except RemoteError as error:
            str(error).encode()
            continue
        assert len(results) == num_queries
        for result in results:
            strings = [result.error or ""]
            strings += [text for d in result.documents for text in (d.id, d.title, d.text)]
            "".join(strings).encode()  # no lone surrogates
            assert len(result.documents) <= k and (result.error is None or not result.documents)
            assert len(result.scores) in (0, len(result.documents))
            assert deserialize_result(serialize_result(result)) == Result(result.documents, result.scores)
