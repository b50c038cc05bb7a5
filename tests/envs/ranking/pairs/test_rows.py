import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.ranking.pairs.rows import PairRow, read_rows, write_rows
from rlkit.errors import UserError

STRINGS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TARGETS = st.floats(0, 10)


@st.composite
def rows(draw):
    passages = [f"p{text}" for text in draw(st.lists(STRINGS, min_size=1, max_size=3))]
    documents = draw(st.sampled_from([(), tuple(f"d{i}" for i in range(len(passages)))]))
    return PairRow(
        draw(STRINGS) + "id",
        draw(STRINGS) + "query",
        tuple(passages),
        tuple(draw(st.lists(TARGETS, min_size=len(passages), max_size=len(passages)))),
        draw(STRINGS),
        draw(STRINGS),
        documents,
        tuple(draw(st.lists(STRINGS, max_size=2))),
    )


@given(st.lists(rows(), min_size=1, max_size=4, unique_by=lambda row: row.id))
def test_rows_are_read_as_they_were_written(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    write_rows(path, written)
    assert read_rows(path) == written


def test_unknown_columns_are_ignored(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"id": "a", "query": "q", "passages": ["p"], "targets": [1], "teacher": "a cross-encoder"}
    path.write_text(json.dumps(row) + "\n")
    assert read_rows(path) == [PairRow("a", "q", ("p",), (1.0,))]


def test_numeric_ids_are_strings(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"id": 7, "query": "q", "passages": ["p"], "targets": [1], "document": 3, "answers": [3, 4]}
    path.write_text(json.dumps(row) + "\n")
    assert read_rows(path) == [PairRow("7", "q", ("p",), (1.0,), document="3", answers=("3", "4"))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3.5}, "id must be a non-empty string, not 3.5"),
        ({"query": " "}, "query must be a non-empty string"),
        ({"passages": []}, "passages must be one or more non-empty strings"),
        ({"passages": [" "]}, "passages must be one or more non-empty strings"),
        ({"query": "lone \ud800"}, "the row has a lone surrogate"),
        ({"passages": "p"}, "passages must be a list of strings, not 'p'"),
        ({"targets": [1, 0]}, "list of 1 finite numbers"),
        ({"targets": [float("nan")]}, "list of 1 finite numbers"),
        ({"targets": [-1]}, "of at least 0"),
        ({"targets": [True]}, "list of 1 finite numbers"),
        ({"targets": [10**400]}, "list of 1 finite numbers"),
        ({"targets": None}, "list of 1 finite numbers"),
        ({"passage_documents": ["a", "b"]}, "one id for each of the 1 passages, not 2"),
        ({"answers": [1.5]}, "answers must be a list of strings"),
        ({"document": 1.5}, "document must be a string"),
        ({"passages_are_queries": "yes"}, "passages_are_queries must be true or false, not 'yes'"),
    ],
)
def test_invalid_rows_name_the_line_and_the_field(tmp_path, change, message):
    valid = {"id": "a", "query": "q", "passages": ["p"], "targets": [1.0]}
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [valid | {"id": "first"}, valid | change])))
    with pytest.raises(UserError, match=f"pairs.jsonl:2: .*{message}"):
        read_rows(path)


def test_rows_of_two_kinds_and_repeated_ids_are_errors(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = PairRow("a", "q", ("p", "s"), (1.0, 0.0))
    write_rows(path, [row, row])
    with pytest.raises(UserError, match=r"pairs.jsonl:2: the id 'a' is also in .*pairs.jsonl:1"):
        read_rows(path)
    write_rows(path, [row, PairRow("b", "q", ("p", "s"), (1.0, 0.0), passages_are_queries=True)])
    with pytest.raises(UserError, match="write the rows with and without it to two files"):
        read_rows(path)
    path.write_text("")
    with pytest.raises(UserError, match="has no rows"):
        read_rows(path)
