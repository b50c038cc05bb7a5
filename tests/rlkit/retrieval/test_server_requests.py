"""Requests of Search-R1's protocol in the spellings of its clients, and the JSON of results."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.retrieval.documents import Document, Result
from rlkit.retrieval.server_requests import RequestError, RequestLimits, encode_result, parse_request

LIMITS = RequestLimits(max_queries=8, max_query_characters=300, max_topk=1000)
DEFAULT_TOPK = 7


def parse(**fields):
    return parse_request(json.dumps(fields).encode(), DEFAULT_TOPK, LIMITS)


@pytest.mark.parametrize(
    ("topk", "expected"),
    [(5, 5), ("5", 5), (" 5 ", 5), ("5.0", 5), (5.0, 5), (1000, 1000), (True, 1)]
    + [(value, DEFAULT_TOPK) for value in (None, 0, "0", 0.0, False)],
)
def test_topk_is_converted_as_by_pydantic(topk, expected):
    assert parse(queries=["a"], topk=topk).topk == expected


@pytest.mark.parametrize("topk", [-1, 1001, "-3", 2.5, "2.5", "many", "", [3], {"k": 3}, 1e300, math.nan])
def test_invalid_topk_is_refused(topk):
    with pytest.raises(RequestError, match="topk must be") as caught:
        parse(queries=["a"], topk=topk)
    assert caught.value.status == 400 and "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((True, 1, 1.0, "true", "True", "1", "yes"), True),
        ((False, 0, 0.0, "false", "FALSE", "0", "off", None), False),
    ],
)
def test_return_scores_is_converted_as_by_pydantic(values, expected):
    for value in values:
        assert parse(queries=["a"], return_scores=value).return_scores is expected


@pytest.mark.parametrize("value", [2, "maybe", [], {}, "", 0.5])
def test_invalid_return_scores_is_refused(value):
    with pytest.raises(RequestError, match="return_scores must be true or false"):
        parse(queries=["a"], return_scores=value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_k": 4}, 4),
        ({"k": "4"}, 4),
        ({"topk_retrieval": 9}, 9),
        ({"topk_retrieval": 9, "rerank_topk": 2}, 2),
        ({"topk_retrieval": 9, "topk_rerank": 2}, 2),
        ({"topk_rerank": None, "topk_retrieval": 9}, 9),
        ({"topk": 5, "topk_retrieval": 9}, 5),
        ({"topk": 0, "top_k": 4}, 4),
        ({"topk": 5, "top_p": 0.9, "model": "e5", "id": [1]}, 5),
        ({}, DEFAULT_TOPK),
    ],
)
def test_other_spellings_of_topk_select_number_of_returned_documents(fields, expected):
    assert parse(queries=["a"], **fields).topk == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"query": "one"}, ["one"]),
        ({"queries": "one"}, ["one"]),
        ({"query": ["one", "two"]}, ["one", "two"]),
        ({"queries": None, "query": "one"}, ["one"]),
        ({"queries": ["one"], "query": "two"}, ["one"]),
        ({"queries": []}, []),
        ({"query": ""}, [""]),
    ],
)
def test_query_is_string_or_list(fields, expected):
    assert parse(**fields).queries == expected


@given(st.lists(st.text(st.characters(codec=None), max_size=400), max_size=8))
def test_any_query_is_accepted_and_others_are_unchanged(queries):
    """A lone surrogate or a long query concerns only itself."""
    parsed = parse(queries=queries).queries
    assert len(parsed) == len(queries)
    for query, received in zip(parsed, queries, strict=True):
        query.encode()
        # Two escaped surrogates in a row are one character in JSON.
        received = json.loads(json.dumps(received))  # noqa: PLW2901
        assert len(query) == min(len(received), LIMITS.max_query_characters)
        for character, original in zip(query, received, strict=False):
            assert character == ("?" if "\ud800" <= original <= "\udfff" else original)


def test_defaults_admit_largest_step_with_long_escaped_queries():
    limits = RequestLimits()
    body = json.dumps({"queries": ["東" * limits.max_query_characters] * 2560, "topk": 3}).encode()
    assert len(body) <= limits.max_body_bytes
    assert len(parse_request(body, 3, limits).queries) == 2560


documents = st.builds(Document, st.text(), st.text(), st.text(st.characters(codec=None)))


@given(st.lists(st.tuples(documents, st.floats(allow_nan=False, allow_infinity=False)), max_size=5))
def test_encoded_result_is_valid_json(items):
    result = Result(tuple(d for d, _ in items), tuple(score for _, score in items))
    with_scores, without = (json.loads(encode_result(result, scores)) for scores in (True, False))
    assert [item["score"] for item in with_scores] == list(result.scores)
    assert [item["document"] for item in with_scores] == without
    assert [item["id"] for item in without] == [document.id for document in result.documents]
