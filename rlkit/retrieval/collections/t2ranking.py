"""Load folders in T2Ranking's layout: collection.tsv, queries.SPLIT.tsv, and two files of judgments a split.

MS MARCO's passage files have this layout, too, without headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection, Qrels, canonical_split, check_judgments
from rlkit.retrieval.collections.beir import add_query, folder_name
from rlkit.retrieval.collections.corpus import IDS, IdSet, file_source
from rlkit.retrieval.collections.files import QUERY_IDS, read_qrels
from rlkit.retrieval.documents import Document
from rlkit.retrieval.tables import canonical, open_text

MIN_RELEVANT = 2  # T2Ranking's own binary judgments are its grades 2 and 3
_HEADERS = {canonical(name) for name in (*IDS, *QUERY_IDS)}


def find_t2ranking(folder: Path) -> Path | None:
    """Return this folder or its `data` (the layout of the repository) if it has a collection.tsv, or None."""
    return next((path for path in (folder, folder / "data") if _find_file(path, "collection")), None)


def load_t2ranking(folder: Path) -> Collection:
    """Load T2Ranking. As in its own evaluation, nDCG and the other measures have separate judgments.

    nDCG uses the grades of `qrels.SPLIT.tsv`, and all other measures the relevant passages that
    `qrels.retrieval.SPLIT.tsv` lists. If a split has only one of the two files, both are derived from it.

    Raises:
        UserError: A file is missing or invalid, or the judgments do not belong to the documents.
    """
    name = folder_name(folder.parent if folder.name == "data" else folder)
    table = _find_file(folder, "collection") or folder / "collection.tsv"
    queries: dict[str, str] = {}
    for path in _split_files(folder, "queries").values():
        for location, query, text in _read_pairs(path):
            add_query(queries, query, text, location)
    graded_files, binary_files = _split_files(folder, "qrels"), _split_files(folder, "qrels.retrieval")
    qrels: dict[str, Qrels] = {}
    binary: dict[str, Qrels] = {}
    notes: list[str] = []
    for split in {**graded_files, **binary_files}:
        graded = read_qrels(graded_files[split]) if split in graded_files else None
        relevant = read_qrels(binary_files[split]) if split in binary_files else None
        key = split if canonical_split(split) in qrels else canonical_split(split)
        qrels[key], binary[key], split_notes = _combine(split, graded, relevant)
        notes += split_notes
    if not qrels:
        raise UserError(f"{folder} has no queries.SPLIT.tsv with a qrels.SPLIT.tsv")
    documents = partial(_documents, table)
    qrels, missing = check_judgments(name, qrels, queries, (document.id for document in documents()))
    binary = {split: {query: binary[split][query] for query in judged} for split, judged in qrels.items()}
    return Collection(
        name,
        documents,
        queries,
        qrels,
        binary=binary,
        source=file_source(table),
        notes=[*notes, *missing],
    )


def _combine(split: str, graded: Qrels | None, relevant: Qrels | None) -> tuple[Qrels, Qrels, list[str]]:
    """Return the graded and the binary judgments of a split from those that it has, and notes.

    Both have the same queries. A passage of grade 1 is listed in the binary ones, as not relevant.
    """
    if graded is None:
        note = f"{split} has no qrels.{split}.tsv: nDCG uses the judgments of qrels.retrieval.{split}.tsv"
        judged = relevant or {}
        return judged, judged, [note]
    if relevant is None:
        if max((grade for grades in graded.values() for grade in grades.values()), default=0) <= 1:
            return graded, graded, []
        binary = {
            query: {document: int(grade >= MIN_RELEVANT) for document, grade in grades.items()}
            for query, grades in graded.items()
        }
        note = (
            f"{split} has no qrels.retrieval.{split}.tsv: for measures other than nDCG, grades of "
            f"{MIN_RELEVANT} and more count as relevant, as in T2Ranking"
        )
        return graded, binary, [note]
    notes = []
    without_grades = relevant.keys() - graded.keys()
    if without_grades:
        notes.append(
            f"{len(without_grades)} queries of qrels.retrieval.{split}.tsv are not in qrels.{split}.tsv, for "
            f"example {min(without_grades)!r}: their nDCG uses binary judgments"
        )
    without_relevant = graded.keys() - relevant.keys()
    if without_relevant:
        notes.append(
            f"{len(without_relevant)} of {len(graded)} queries of qrels.{split}.tsv have no relevant passage "
            f"in qrels.retrieval.{split}.tsv, for example {min(without_relevant)!r}: they score 0 in "
            "measures other than nDCG, while T2Ranking's own evaluation leaves them out"
        )
    judged = graded | {query: relevant[query] for query in without_grades}
    binary = {query: dict.fromkeys(judged[query], 0) | relevant.get(query, {}) for query in judged}
    return judged, binary, notes


def _find_file(folder: Path, stem: str) -> Path | None:
    paths = (folder / f"{stem}.tsv", folder / f"{stem}.tsv.gz")
    return next((path for path in paths if path.is_file()), None)


def _split_files(folder: Path, stem: str) -> dict[str, Path]:
    """Return the files STEM.SPLIT.tsv by split. A split may contain dots, as MS MARCO's `dev.small`."""
    files = {}
    for path in sorted(folder.glob(f"{stem}.*"), reverse=True):  # .tsv is preferred to .tsv.gz
        match = re.fullmatch(rf"{re.escape(stem)}\.(.+)\.tsv(\.gz)?", path.name)
        if match and not match[1].startswith("retrieval."):
            files[match[1]] = path
    return dict(sorted(files.items()))


def _documents(path: Path) -> Iterator[Document]:
    ids = IdSet()
    is_empty = True
    for location, name, text in _read_pairs(path):
        is_empty = False
        if not ids.add(name):
            raise UserError(f"{location}: the id {name!r} is a duplicate; make the ids unique")
        yield Document(name, "", text)
    if is_empty:
        raise UserError(f"{path} has no documents")


def _read_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the location, the id and the text of each line of a file, without its header if it has one.

    Quotes are ordinary characters: passages of T2Ranking contain unbalanced ones.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with open_text(path, "\n") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\r\n").split("\t")
            if (number == 1 and canonical(fields[0]) in _HEADERS) or not line.strip():
                continue
            if len(fields) != 2:
                raise UserError(f"{path}:{number}: {len(fields)} fields, expected 2; is it truncated?")
            yield f"{path}:{number}", fields[0], fields[1]
