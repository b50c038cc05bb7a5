"""Read collections from files: the layouts of BEIR and T2Ranking, and judgments of TREC.

Every fault is said with file and line: a row that is cut short, an id that repeats, a header that is missing,
a document that was judged but is not there.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection, Qrels, check_judged
from rlkit.retrieval.collections.corpus import READERS, corpus_source, read_corpus
from rlkit.retrieval.documents import Document

Rows = Iterator[tuple[str, list[str]]]


def load_beir(folder: Path) -> Collection:
    """A folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv (beir-cellar/beir, `data_loader.py`).

    Raises:
        UserError: a file is missing or wrong.
    """
    queries = read_queries(folder / "queries.jsonl")
    files = {path.stem: path for path in sorted((folder / "qrels").glob("*.tsv"))}
    if not files:
        raise UserError(f"{folder / 'qrels'} has no train.tsv, dev.tsv or test.tsv")
    # Each time it is read the faults of the corpus show; the first time is here.
    header = ("query-id", "corpus-id", "score")
    return _checked(folder, {s: _table(path, header) for s, path in files.items()}, queries, corpus(folder))


def corpus(folder: Path) -> Callable[[], Iterator[Document]]:
    """What reads `corpus.jsonl`."""
    return partial(read_corpus, str(folder))


def read_queries(path: Path) -> dict[str, str]:
    """Texts by id, from rows with `_id` (or `id`) and `text`; raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    found: dict[str, str] = {}
    for where, row in READERS[path.suffix](path):
        name, text = row.get("_id", row.get("id")), row.get("text")
        if isinstance(name, bool) or not isinstance(name, str | int) or not isinstance(text, str):
            raise UserError(f"{where}: a query needs an _id and a text")
        _put(found, str(name), text, where)
    return found


def load_t2ranking(folder: Path) -> Collection:
    """A folder with T2Ranking's collection.tsv, queries.SPLIT.tsv and qrels.SPLIT.tsv (THUIR/T2Ranking).

    The judgments for retrieval (`qrels.retrieval.SPLIT.tsv`) say relevant or not; those of `qrels.SPLIT.tsv`
    are graded and are taken where they are there.

    Raises:
        UserError: a file is missing or wrong.
    """
    queries: dict[str, str] = {}
    judged = {}
    for path in sorted(folder.glob("queries.*.tsv")):
        split = path.stem.removeprefix("queries.")
        for where, (name, text) in _table(path, ("qid", "text")):
            _put(queries, name, text, where)
        graded, plain = folder / f"qrels.{split}.tsv", folder / f"qrels.retrieval.{split}.tsv"
        if graded.exists():
            judged[split] = _cut(_trec(graded, header=True))
        elif plain.exists():
            judged[split] = ((where, [*row, "1"]) for where, row in _table(plain, ("qid", "pid")))
    if not judged:
        raise UserError(f"{folder} has no queries.SPLIT.tsv with a qrels.SPLIT.tsv")
    return _checked(folder, judged, queries, partial(_t2_documents, folder / "collection.tsv"))


def _t2_documents(path: Path) -> Iterator[Document]:
    empty = True
    for _, (name, text) in _table(path, ("pid", "text")):
        empty = False
        yield Document(name, "", text)
    if empty:
        raise UserError(f"{path} has no documents")


def read_qrels(path: Path) -> Qrels:
    """Judgments of TREC: query, anything, document and grade in a line, with white space between.

    Raises:
        UserError: a line is another, or judges again.
    """
    return _read_judgments(_cut(_trec(path)))[0]


def read_run(path: Path) -> dict[str, list[str]]:
    """Rankings of a TREC run, best first: by score, equal scores by id descending, as trec_eval does.

    Raises:
        UserError: a line is no such, or a document repeats.
    """
    found: dict[str, dict[str, float]] = {}
    for where, fields in _lines(path, 6, "qid Q0 docid rank score tag"):
        try:
            score = float(fields[4])
        except ValueError:
            raise UserError(f"{where}: the score {fields[4]!r} is no number") from None
        _put(found.setdefault(fields[0], {}), fields[2], score, where)
    return {q: sorted(run, key=lambda d: (run[d], d), reverse=True) for q, run in found.items()}


def _checked(
    folder: Path,
    judged: Mapping[str, Iterable[tuple[str, list[str]]]],
    queries: dict[str, str],
    documents: Callable[[], Iterator[Document]],
) -> Collection:
    qrels, places = {}, {}
    for split, rows in judged.items():
        qrels[split], where = _read_judgments(rows)
        places.update(where)
        for query in qrels[split]:
            if query not in queries:
                raise UserError(f"{folder.name}: the qrels of {split} judge {query!r}, which is no query")
    check_judged(folder.name, places, documents())
    table = folder / "collection.tsv"
    source = corpus_source(str(folder)) if not table.exists() else [str(table), table.stat().st_mtime_ns]
    return Collection(folder.name, documents, queries, qrels, source=source)


def _read_judgments(rows: Iterable[tuple[str, list[str]]]) -> tuple[Qrels, dict[str, str]]:
    """Grades, and where each document was judged first."""
    found: Qrels = {}
    places: dict[str, str] = {}
    for where, (query, document, grade) in rows:
        try:
            number = float(grade)
        except ValueError:
            raise UserError(f"{where}: the grade {grade!r} is no number") from None
        if number != int(number):
            raise UserError(f"{where}: the grade {grade!r} is no whole number")
        _put(found.setdefault(query, {}), document, int(number), where)
        places.setdefault(document, where)
    return found, places


def _put(into: dict, key: str, value: object, where: str) -> None:
    if key in into:
        raise UserError(f"{where}: {key!r} repeats; make the ids differ")
    into[key] = value


def _table(path: Path, header: tuple[str, ...]) -> Rows:
    """Rows of a table with tabs and this header; there are no quotes in it."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        csv.field_size_limit(2**31 - 1)
        try:
            if tuple(next(reader, ())) != header:
                raise UserError(f"{path}:1: the first line must be the header {' '.join(header)}, with tabs")
            for row in reader:
                if len(row) != len(header):
                    raise UserError(
                        f"{path}:{reader.line_num}: {len(row)} fields, not {len(header)}; is it cut short?"
                    )
                yield f"{path}:{reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{reader.line_num}: no whole row ({error}); is it cut short?") from None


def _trec(path: Path, header: bool = False) -> Rows:
    return _lines(path, 4, "qid 0 docid grade", skip=int(header))


def _cut(rows: Rows) -> Rows:
    """Query, document and grade of TREC's lines."""
    return ((where, [fields[0], fields[2], fields[3]]) for where, fields in rows)


def _lines(path: Path, fields: int, form: str, skip: int = 0) -> Rows:
    """The words of each line."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if not words or number <= skip:
                continue
            if len(words) != fields:
                raise UserError(f"{path}:{number}: {len(words)} fields, not {form!r}; is it cut short?")
            yield f"{path}:{number}", words
