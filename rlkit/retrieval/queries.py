"""Judged queries of a collection, which environments turn into tasks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from rlkit.environment import SPLITS
from rlkit.errors import UserError, check_choice
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document
from rlkit.words import truncate_words

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgedQuery:
    """A query and its relevance judgments.

    Attributes:
        id: Identifier of the query.
        text: Text of the query.
        grades: Grades by document id. None of them is above 0 if nothing relevant was judged.
    """

    id: str
    text: str
    grades: Mapping[str, int]

    @property
    def ideal(self) -> list[int]:
        """The grades above 0, highest first: the gains of an ideal ranking."""
        return [self.grades[name] for name in self.relevant]

    @property
    def relevant(self) -> list[str]:
        """The ids of the documents with a grade above 0 in an ideal order, by grade and then by id."""
        names = [name for name, grade in self.grades.items() if grade > 0]
        return sorted(names, key=lambda name: (-self.grades[name], name))


def judged_queries(
    collection: Collection, split: str, n: int | None, seed: int, *, require_relevant: bool = True
) -> list[JudgedQuery]:
    """Return the first `n` queries of a split (None: all), shuffled by the seed.

    Args:
        collection: Collection that has the queries and judgments.
        split: "train", "dev" or "test".
        n: Maximum number of queries; None returns all.
        seed: Random seed of the order.
        require_relevant: Whether to skip queries without a relevant document, from which nothing can be
            learned. Evaluations include them: trec_eval scores them 0.

    Raises:
        UserError: The split is unknown, or the collection does not have it.
    """
    check_choice("split", split, SPLITS)
    judged = collection.judged(split)
    names = [
        name
        for name, grades in judged.items()
        if not require_relevant or any(grade > 0 for grade in grades.values())
    ]
    # Sorting by a hash keeps the order of two queries when a collection gains or loses others.
    names.sort(key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return [JudgedQuery(name, collection.queries[name], judged[name]) for name in names[:n]]


def documents_by_id(collection: Collection, ids: Iterable[str]) -> dict[str, Document]:
    """Return documents by their judged ids, read in one pass over the collection.

    If the collection ranks passages, the first passage of each document is returned.
    """
    missing = set(ids)
    documents: dict[str, Document] = {}
    if not missing:
        return documents
    for document in collection.documents():
        name = collection.judged_id(document.id)
        if name in missing:
            missing.remove(name)
            documents[name] = replace(document, id=name)
    return documents


def open_collection(name: str, folds: int | None, fold: int, drop_query_id: bool | None = None) -> Collection:
    """Load a collection by name, and log its notes as warnings, once per process.

    Args:
        name: Name of the collection; see `rlkit.retrieval.collections.base`.
        folds: Number of cross-validation folds to split the queries into; None keeps the splits.
        fold: Index of the fold that is the test split.
        drop_query_id: Whether to remove the document whose id equals the query's from its ranking; None
            follows the benchmark, which drops it in BEIR's ArguAna and Quora only.

    Raises:
        UserError: The collection does not exist, or an argument is out of range.
    """
    if drop_query_id is not None and not isinstance(drop_query_id, bool):
        raise UserError(f"drop_query_id must be true or false, not {drop_query_id!r}")
    collection = load_collection(name)
    if drop_query_id is not None:
        collection = replace(collection, drop_query_id=drop_query_id)
    elif collection.drop_query_id:
        note = "as in BEIR, a document with its query's id is dropped; set drop_query_id to false to keep it"
        collection = replace(collection, notes=[*collection.notes, note])
    for note in collection.notes:
        _log_once(f"{collection.name}: {note}")
    return collection if folds is None else collection.folds(folds, fold)


@cache
def _log_once(warning: str) -> None:
    """Log a warning once per process: several environments may open the same collection."""
    _log.warning("%s", warning)


def task_id(*content: str) -> str:
    """Return a task id of 16 hexadecimal digits, hashed from the content."""
    return hashlib.sha256("\x1f".join(content).encode()).hexdigest()[:16]


def snippet(text: str, max_words: int) -> str:
    """Return a string on one line, truncated to `max_words` words; see `rlkit.words.truncate_words`."""
    return truncate_words(" ".join(text.split()), max_words)
