"""Read relevance judgments and run files in the formats in which they are published.

Judgments are in TREC's format (`qid 0 docid grade`), in BEIR's (a header and three columns), or rows of a
JSONL, CSV or Parquet file. Every error names the file and the line.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Qrels
from rlkit.retrieval.tables import canonical, file_type, get_value, iterate_rows, open_text

QUERY_IDS = ("query-id", "qid", "query", "q-id", "topic-id", "topic")
DOCUMENT_IDS = ("corpus-id", "doc-id", "pid", "did", "passage-id", "document-id", "docno", "doc", "document")
GRADES = ("score", "relevance", "rel", "label", "grade", "relevance-score", "judgment")
TEXT_SUFFIXES = (".tsv", ".txt", ".qrels", "")  # of files whose columns white space separates
# trec_eval separates fields at ASCII white space. Python's str.split also splits ids at a no-break space.
WHITE_SPACE = " \t\r\n\v\f"
_SEPARATOR = re.compile(f"[{WHITE_SPACE}]+")

MAX_GRADE = 2**63 - 1

Grade = str | float | None
SplitLine = Callable[[str], list[str]]


class Judgment(NamedTuple):
    """A row of a qrels file, and where it is (`FILE:LINE`)."""

    location: str
    query: str
    document: str
    grade: Grade


def read_qrels(*paths: Path) -> Qrels:
    """Return grades by query and document from one or more files in any of the formats of judgments.

    Whole grades may be written as decimals ("1.0"). A judgment may repeat if its grade is the same.

    Raises:
        UserError: A file does not exist or is empty, a line is malformed, a grade is not an integer, or a
            document has two different grades for a query.
    """
    qrels: Qrels = {}
    for path in paths:
        for location, query, document, value in iterate_judgments(path):
            grade = parse_grade(value, location)
            grades = qrels.setdefault(query, {})
            if grades.setdefault(document, grade) != grade:
                rows = chain.from_iterable(map(iterate_judgments, paths))
                first = next(row for row in rows if (row.query, row.document) == (query, document))
                raise UserError(
                    f"{location}: document {document!r} has the grade {grade} for query {query!r}, but "
                    f"{grades[document]} in {first.location}; remove one of the two"
                )
    return qrels


def parse_grade(value: Grade, location: str, truncate: bool = False) -> int:
    """Return a relevance grade as an integer.

    Raises:
        UserError: It is not a number, does not fit in 64 bits as in trec_eval, or has a fraction that is not
            to be truncated.
    """
    try:
        # float accepts "1_0".
        number = math.nan if value is None or "_" in str(value) else float(value)
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise UserError(f"{location}: the grade {value!r} is not a number")
    if not truncate and not number.is_integer():
        raise UserError(f"{location}: the grade {value!r} is not an integer")
    text = str(value).strip()
    # A float has 53 bits.
    grade = int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else int(number)
    if abs(grade) > MAX_GRADE:
        raise UserError(f"{location}: the grade must have at most 64 bits, not {value}")
    return grade


def iterate_judgments(path: Path) -> Iterator[Judgment]:
    """Yield the judgments of a file one at a time, with unchecked grades.

    Raises:
        UserError: The file does not exist or is empty, its format is unknown, or a line is malformed.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if file_type(path) in (".jsonl", ".json", ".csv", ".parquet"):
        yield from _table_judgments(path)
    else:
        yield from _text_judgments(path)


def _table_judgments(path: Path) -> Iterator[Judgment]:
    for location, row in iterate_rows(path, (*QUERY_IDS, *DOCUMENT_IDS, *GRADES)):
        query, document = _to_id(get_value(row, QUERY_IDS)), _to_id(get_value(row, DOCUMENT_IDS))
        if query is None or document is None:
            raise UserError(
                f"{location}: a judgment needs the columns query-id, corpus-id and score; it has "
                f"{', '.join(row) or 'none'}"
            )
        yield Judgment(location, query, document, get_value(row, GRADES))


def _to_id(value: object) -> str | None:
    is_id = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value) if is_id else None


def _text_judgments(path: Path) -> Iterator[Judgment]:
    split: SplitLine | None = None
    with open_text(path, "\n") as file:
        for number, line in enumerate(file, 1):
            location = f"{path}:{number}"
            stripped = line.strip(WHITE_SPACE)
            is_comment = stripped.startswith("#")
            # In a tab-separated file, an id may start with #.
            if not stripped or (is_comment and split is not split_tabs):
                continue
            if split is None:
                split, columns, width, is_header = _find_columns(line, location)
                if is_header:
                    continue
            fields = split(line)
            if len(fields) > width and fields[width].startswith("#"):
                fields = fields[:width]
            if len(fields) != width:
                if is_comment:
                    continue
                raise UserError(f"{location}: {len(fields)} fields, expected {width}; is it truncated?")
            query, document, *grade = (fields[i] for i in columns)
            yield Judgment(location, query, document, grade[0] if grade else 1)
    if split is None:
        raise UserError(f"{path} has no judgments; is it truncated?")


def _find_columns(line: str, location: str) -> tuple[SplitLine, Sequence[int], int, bool]:
    """Find the format of a qrels file from its first line.

    Returns:
        The function that splits a line; the positions of query, document and grade, the last of which is
        missing if the file lists relevant documents only; the number of columns; and whether the line is a
        header.
    """
    by_tab, by_space = split_tabs(line), split_space(line)
    for split, fields in ((split_tabs, by_tab), (split_space, by_space)):
        names = [canonical(name) for name in fields]
        positions = [_find_name(names, columns) for columns in (QUERY_IDS, DOCUMENT_IDS, GRADES)]
        if positions[0] is not None and positions[1] is not None:
            if positions[2] is None and len(names) > 2:
                raise UserError(f"{location}: the header has no column for the grade, such as {GRADES[0]}")
            return split, [i for i in positions if i is not None], len(names), True
    is_trec = len(by_tab) != 3 or (len(by_space) == 4 and by_space[1].upper() in ("0", "Q0"))
    split, fields = (split_space, by_space) if is_trec else (split_tabs, by_tab)
    if len(fields) > 4 and fields[4].startswith("#"):
        fields = fields[:4]
    if len(fields) != (4 if is_trec else 3):
        raise UserError(
            f"{location}: {len(fields)} fields, expected 'qid 0 docid grade', or a header with the "
            "tab-separated columns query-id, corpus-id and score; is it truncated?"
        )
    try:
        parse_grade(fields[-1], location)
    except UserError as error:
        raise UserError(
            f"{error}; if the line is a header, name its columns query-id, corpus-id and score"
        ) from None
    return split, (0, len(fields) - 2, len(fields) - 1), len(fields), False


def _find_name(names: Sequence[str], columns: Iterable[str]) -> int | None:
    return next((names.index(canonical(name)) for name in columns if canonical(name) in names), None)


def split_tabs(line: str) -> list[str]:
    """Return the fields of a tab-separated line. As BEIR reads them, they may be quoted as in CSV."""
    line = line.rstrip("\r\n")
    if '"' in line:
        try:
            return next(csv.reader([line], "excel-tab", strict=True))
        except csv.Error:
            pass
    return line.split("\t")


def split_space(line: str) -> list[str]:
    """Return the fields of a line that white space separates."""
    return _SEPARATOR.split(line.strip(WHITE_SPACE))


def read_run(path: Path) -> dict[str, list[str]]:
    """Return the rankings of a TREC run file by query, best first.

    As in trec_eval, the rank column is ignored: documents are sorted by score (in single precision), ties by
    id, descending. What follows the first word of the tag is ignored, and so are blank lines and lines that
    start with `#`.

    Raises:
        UserError: The file does not exist, a line is malformed, or a document repeats in a ranking.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    scores: dict[str, dict[str, float]] = {}
    with open_text(path, "\n") as file:
        for number, line in enumerate(file, 1):
            stripped = line.strip(WHITE_SPACE)
            if not stripped or stripped.startswith("#"):
                continue
            fields = _SEPARATOR.split(stripped, 5)
            if len(fields) < 6:
                raise UserError(
                    f"{path}:{number}: {len(fields)} fields, expected 'qid Q0 docid rank score tag'; is it "
                    "truncated?"
                )
            query, _, document, _, value, _ = fields
            ranking = scores.setdefault(query, {})
            if document in ranking:
                raise UserError(
                    f"{path}:{number}: document {document!r} repeats in the ranking of query {query!r}; "
                    "remove one of its lines"
                )
            ranking[document] = _parse_score(value, f"{path}:{number}")
    return {query: _sort_by_score(run) for query, run in scores.items()}


def _sort_by_score(scores: Mapping[str, float]) -> list[str]:
    """Return documents by score and id, descending."""
    # trec_eval reads scores in single precision, where more of them are ties.
    with np.errstate(over="ignore"):
        values = np.fromiter(scores.values(), np.float32, len(scores)).tolist()
    return [document for _, document in sorted(zip(values, scores, strict=True), reverse=True)]


def _parse_score(value: str, location: str) -> float:
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if math.isnan(score):
        raise UserError(f"{location}: the score {value!r} is not a number")
    return score
