"""Read collections in the file layouts of BEIR and T2Ranking, and TREC's qrels and run files.

Every error names the file and the line: a truncated row, a repeated id, a missing header, a judged document
that the corpus does not have.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection, Qrels, check_judged_documents
from rlkit.retrieval.collections.corpus import corpus_source, read_corpus
from rlkit.retrieval.documents import Document
from rlkit.retrieval.tables import iterate_rows

Rows = Iterator[tuple[str, list[str]]]  # location (`FILE:LINE`) and fields


def load_beir(folder: Path) -> Collection:
    """Load a folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv (BEIR's `GenericDataLoader`).

    Raises:
        UserError: A file is missing or invalid.
    """
    queries = read_queries(folder / "queries.jsonl")
    files = {path.stem: path for path in sorted((folder / "qrels").glob("*.tsv"))}
    if not files:
        raise UserError(f"{folder / 'qrels'} has no train.tsv, dev.tsv or test.tsv")
    judgments = {split: _read_tsv(path, ("query-id", "corpus-id", "score")) for split, path in files.items()}
    return _build_collection(folder, judgments, queries, partial(read_corpus, str(folder)))


def read_queries(path: Path) -> dict[str, str]:
    """Return query texts by id from rows with `_id` (or `id`) and `text`; raises UserError."""
    queries: dict[str, str] = {}
    for location, row in iterate_rows(path):
        name, text = row.get("_id", row.get("id")), row.get("text")
        if isinstance(name, bool) or not isinstance(name, str | int) or not isinstance(text, str):
            raise UserError(f"{location}: a query needs an _id (string or integer) and a string in text")
        _add_unique(queries, str(name), text, location)
    return queries


def load_t2ranking(folder: Path) -> Collection:
    """Load a folder with T2Ranking's collection.tsv, queries.SPLIT.tsv and qrels.SPLIT.tsv (THUIR/T2Ranking).

    The graded judgments of `qrels.SPLIT.tsv` are used if the file exists, and otherwise the binary ones of
    `qrels.retrieval.SPLIT.tsv`.

    Raises:
        UserError: A file is missing or invalid.
    """
    queries: dict[str, str] = {}
    judgments: dict[str, Rows] = {}
    for path in sorted(folder.glob("queries.*.tsv")):
        split = path.stem.removeprefix("queries.")
        for location, (name, text) in _read_tsv(path, ("qid", "text")):
            _add_unique(queries, name, text, location)
        graded, binary = folder / f"qrels.{split}.tsv", folder / f"qrels.retrieval.{split}.tsv"
        if graded.exists():
            judgments[split] = _read_trec_qrels(graded, header_lines=1)
        elif binary.exists():
            rows = _read_tsv(binary, ("qid", "pid"))
            judgments[split] = ((location, [*row, "1"]) for location, row in rows)
    if not judgments:
        raise UserError(f"{folder} has no queries.SPLIT.tsv with a qrels.SPLIT.tsv")
    return _build_collection(folder, judgments, queries, partial(_t2_documents, folder / "collection.tsv"))


def _t2_documents(path: Path) -> Iterator[Document]:
    empty = True
    for _, (name, text) in _read_tsv(path, ("pid", "text")):
        empty = False
        yield Document(name, "", text)
    if empty:
        raise UserError(f"{path} has no documents")


def read_qrels(path: Path) -> Qrels:
    """Read a TREC qrels file: `qid 0 docid grade` on each line, separated by white space.

    Raises:
        UserError: A line is malformed, or a document is judged twice for a query.
    """
    return _read_judgments(_read_trec_qrels(path))[0]


def read_run(path: Path) -> dict[str, list[str]]:
    """Return the rankings of a TREC run file by query, best first.

    As in trec_eval, the rank column is ignored: documents are sorted by score, ties by id, descending.

    Raises:
        UserError: A line is malformed, or a document repeats in a ranking.
    """
    scores: dict[str, dict[str, float]] = {}
    for location, fields in _read_fields(path, "qid Q0 docid rank score tag"):
        try:
            score = float(fields[4])
        except ValueError:
            raise UserError(f"{location}: the score {fields[4]!r} is not a number") from None
        _add_unique(scores.setdefault(fields[0], {}), fields[2], score, location)
    return {query: sorted(run, key=lambda d: (run[d], d), reverse=True) for query, run in scores.items()}


def _build_collection(
    folder: Path,
    judgments: Mapping[str, Rows],
    queries: dict[str, str],
    documents: Callable[[], Iterator[Document]],
) -> Collection:
    """Read the judgments of each split and check that their queries and documents exist."""
    qrels, locations = {}, {}
    for split, rows in judgments.items():
        qrels[split], split_locations = _read_judgments(rows)
        locations.update(split_locations)
        for query in qrels[split]:
            if query not in queries:
                raise UserError(
                    f"{folder.name}: the qrels of {split} judge {query!r}, which is not one of the queries"
                )
    # This reads the corpus once, so that a malformed row is reported now and not during training.
    check_judged_documents(folder.name, locations, documents())
    table = folder / "collection.tsv"
    source = corpus_source(str(folder)) if not table.exists() else [str(table), table.stat().st_mtime_ns]
    return Collection(folder.name, documents, queries, qrels, source=source)


def _read_judgments(rows: Rows) -> tuple[Qrels, dict[str, str]]:
    """Return the grades by query and document, and the location of each document's first judgment."""
    qrels: Qrels = {}
    locations: dict[str, str] = {}
    for location, (query, document, grade) in rows:
        try:
            number = float(grade)
        except ValueError:
            raise UserError(f"{location}: the grade {grade!r} is not a number") from None
        # Some qrels write grades as 1.0.
        if number != int(number):
            raise UserError(f"{location}: the grade {grade!r} is not an integer")
        _add_unique(qrels.setdefault(query, {}), document, int(number), location)
        locations.setdefault(document, location)
    return qrels, locations


def _add_unique(values: dict, key: str, value: object, location: str) -> None:
    if key in values:
        raise UserError(f"{location}: the id {key!r} is a duplicate; make the ids unique")
    values[key] = value


def _read_tsv(path: Path, header: tuple[str, ...]) -> Rows:
    """Read a tab-separated file with this header. Quotes are ordinary characters in it."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Passages of T2Ranking contain unbalanced quotes.
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        csv.field_size_limit(2**31 - 1)  # the default raises on fields of more than 128 KiB
        try:
            if tuple(next(reader, ())) != header:
                raise UserError(
                    f"{path}:1: the first line must be the tab-separated header {' '.join(header)}"
                )
            for row in reader:
                if len(row) != len(header):
                    counts = f"{len(row)} fields, expected {len(header)}"
                    raise UserError(f"{path}:{reader.line_num}: {counts}; is it truncated?")
                yield f"{path}:{reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{reader.line_num}: invalid row ({error}); is it truncated?") from None


def _read_trec_qrels(path: Path, header_lines: int = 0) -> Rows:
    """Read the query, document and grade of each line."""
    for location, (query, _, document, grade) in _read_fields(path, "qid 0 docid grade", header_lines):
        yield location, [query, document, grade]


def _read_fields(path: Path, line_format: str, header_lines: int = 0) -> Rows:
    """Read the fields of each line, which white space separates, and check their number."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    num_fields = len(line_format.split())
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields or number <= header_lines:
                continue
            if len(fields) != num_fields:
                raise UserError(
                    f"{path}:{number}: {len(fields)} fields, expected {line_format!r}; is it truncated?"
                )
            yield f"{path}:{number}", fields
