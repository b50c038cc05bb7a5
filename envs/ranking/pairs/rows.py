"""One row of a file of training pairs: a query, its passages, and a target for each passage.

    {"id": "ict/sendfile.2/0", "query": "…", "passages": ["…"], "targets": [1.0], "source": "ict",
     "document": "sendfile.2"}

A pair has one passage. A triple has two, with targets 1 and 0. A list has any number, with the grades of
judges or the scores of a teacher as targets.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rlkit.encoding import encodable
from rlkit.errors import UserError
from rlkit.files import atomic_write
from rlkit.retrieval.tables import iterate_rows


@dataclass(frozen=True)
class PairRow:
    """One training row.

    Attributes:
        id: Identifier, unique in the file.
        query: Text of the query.
        passages: Texts of the passages, at least one.
        targets: Relevance of each passage, at least 0: a grade, or the score of a teacher.
        source: Name of the generator, such as "ict".
        document: Id of the document that the row is generated from.
        passage_documents: Id of each passage's document; empty if all are `document`.
        answers: Ids of documents that are known to answer the query. Their passages are not used as
            negatives. Empty if `document` is the only one.
        passages_are_queries: Whether the passages are queries, and the query is a document (PROP).
    """

    id: str
    query: str
    passages: tuple[str, ...]
    targets: tuple[float, ...]
    source: str = ""
    document: str = ""
    passage_documents: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    passages_are_queries: bool = False


_OPTIONAL = {field.name: field.default for field in fields(PairRow) if field.default is not MISSING}


def check_output(path: Path) -> None:
    """Raise UserError unless the path of the option --out is that of a new file of rows."""
    if path.suffix != ".jsonl":
        raise UserError(f"--out must end in .jsonl, not {path.name}")
    if path.exists():
        raise UserError(f"{path} already exists: delete it, or use another -o")


def query_key(query: str) -> str:
    """Return a query in lowercase, with single spaces and without a mark at its end."""
    return " ".join(query.casefold().rstrip(" \t\n.?!").split())


def answer_ids(row: PairRow) -> set[str]:
    """Return the ids of a row's source document, its answers and its passages with a target above 0."""
    passages = zip(row.passage_documents, row.targets, strict=False)  # there may be no documents
    return {row.document, *row.answers, *(name for name, target in passages if target > 0)} - {""}


def write_rows(path: Path, rows: Iterable[PairRow]) -> None:
    """Write rows as JSONL, atomically. Optional fields with their default value are left out."""
    lines = []
    for row in rows:
        values = asdict(row)
        used = {name: value for name, value in values.items() if value != _OPTIONAL.get(name, MISSING)}
        lines.append(json.dumps(used, ensure_ascii=False) + "\n")
    atomic_write(path, "".join(lines))


def read_rows(path: str | Path) -> list[PairRow]:
    """Return the rows of a JSONL or Parquet file. Columns that are not fields of `PairRow` are ignored.

    Raises:
        UserError: The file does not exist or has no rows, a row is invalid, or an id repeats. The message
            names the file and the line.
    """
    path = Path(path).expanduser()
    rows: list[PairRow] = []
    lines: dict[str, str] = {}
    for location, values in iterate_rows(path, tuple(field.name for field in fields(PairRow))):
        row = _row(values, location)
        if row.id in lines:
            raise UserError(f"{location}: the id {row.id!r} is also in {lines[row.id]}; make the ids unique")
        if rows and row.passages_are_queries != rows[0].passages_are_queries:
            raise UserError(
                f"{location}: passages_are_queries differs from the first row's: write the rows with and "
                "without it to two files"
            )
        lines[row.id] = location
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _row(values: Mapping[str, Any], location: str) -> PairRow:
    # Numeric ids are common in exported tables.
    values = {name: str(value) if _is_integer(value) else value for name, value in values.items()}
    for name in ("id", "query"):
        if not isinstance(values.get(name), str) or not values[name].strip():
            raise UserError(f"{location}: {name} must be a non-empty string, not {values.get(name)!r:.60}")
    passages = _strings(values, "passages", location)
    targets = values.get("targets")
    if not passages or not all(passage.strip() for passage in passages):
        raise UserError(f"{location}: passages must be one or more non-empty strings")
    if not isinstance(targets, list) or not all(map(_is_target, targets)) or len(targets) != len(passages):
        raise UserError(
            f"{location}: targets must be a list of {len(passages)} finite numbers of at least 0, one per "
            f"passage, not {targets!r:.60}; scale a teacher's scores to [0, 1]"
        )
    documents = _strings(values, "passage_documents", location)
    if documents and len(documents) != len(passages):
        raise UserError(
            f"{location}: passage_documents must have one id for each of the {len(passages)} passages, not "
            f"{len(documents)}"
        )
    for name in ("source", "document"):
        if not isinstance(values.get(name) or "", str):
            raise UserError(f"{location}: {name} must be a string, not {values[name]!r:.60}")
    passages_are_queries = values.get("passages_are_queries") or False
    if not isinstance(passages_are_queries, bool):
        raise UserError(
            f"{location}: passages_are_queries must be true or false, not {passages_are_queries!r:.60}"
        )
    row = PairRow(
        values["id"],
        values["query"],
        passages,
        tuple(float(target) for target in targets),
        values.get("source") or "",
        values.get("document") or "",
        documents,
        _strings(values, "answers", location),
        passages_are_queries,
    )
    strings = [row.id, row.query, row.source, row.document, *passages, *documents, *row.answers]
    if encodable(strings) != strings:
        raise UserError(f"{location}: the row has a lone surrogate; was it cut inside a character?")
    return row


def _strings(values: Mapping[str, Any], name: str, location: str) -> tuple[str, ...]:
    """Return the strings of a field, which may be missing."""
    strings = values.get(name) or []
    if isinstance(strings, list) and name != "passages":
        strings = [str(string) if _is_integer(string) else string for string in strings]
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise UserError(f"{location}: {name} must be a list of strings, not {strings!r:.60}")
    return tuple(strings)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_target(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 <= value <= sys.float_info.max  # also false for NaN
