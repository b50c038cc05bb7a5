"""The judged queries of a collection as tasks of an environment."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from rlkit.environment import SPLITS
from rlkit.errors import check_choice
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document


@dataclass(frozen=True)
class Judged:
    """One query: its id and text, and the grades of documents, of which one or more are above 0."""

    id: str
    text: str
    grades: Mapping[str, int]

    @property
    def ideal(self) -> list[int]:
        """The grades above 0, highest first."""
        return sorted((grade for grade in self.grades.values() if grade > 0), reverse=True)


def judged_queries(collection: Collection, split: str, n: int | None, seed: int) -> list[Judged]:
    """The first `n` queries of a split in the order of a seed; those that nothing answers are left out.

    Raises:
        UserError: no such split, in general or of the collection.
    """
    check_choice("split", split, SPLITS)
    judged = collection.judged(split)
    names = [name for name, grades in judged.items() if any(grade > 0 for grade in grades.values())]
    names.sort(key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return [Judged(name, collection.queries[name], judged[name]) for name in names[:n]]


def documents_of(collection: Collection, names: Iterable[str]) -> dict[str, Document]:
    """Documents by the ids that are judged, by one pass through the collection; of passages the first."""
    wanted = set(names)
    found: dict[str, Document] = {}
    for document in collection.documents() if wanted else ():
        name = collection.judged_id(document.id)
        if name in wanted:
            found.setdefault(name, replace(document, id=name))
    return found


def open_collection(name: str, folds: int | None, fold: int) -> Collection:
    """A collection, with its queries dealt to folds where `folds` says so; raises UserError."""
    collection = load_collection(name)
    return collection if folds is None else collection.folds(folds, fold)


def task_id(*content: str) -> str:
    """An id that the content decides."""
    return hashlib.sha256("\x1f".join(content).encode()).hexdigest()[:16]


def cut(text: str, words: int) -> str:
    """A text of at most so many words, with a mark where it was longer."""
    found = text.split()
    return " ".join([*found[:words], "…"] if len(found) > words else found)
