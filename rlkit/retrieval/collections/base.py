"""A collection: documents, queries, and which documents are relevant to which query.

`rlkit.retrieval.collections.load` opens one by its name: a folder in the layout of BEIR (`corpus.jsonl`,
`queries.jsonl`, `qrels/SPLIT.tsv`) or of T2Ranking, `ir_datasets:NAME` for any set of ir-datasets,
`bright:SUBSET`, `crumb:TASK`, or `generated:SIZE:SEED`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlkit.errors import UserError, nearest
from rlkit.retrieval.documents import Document

Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgments.

    Attributes:
        name: for messages and ids.
        documents: reads them, one at a time: they need not fit in memory.
        queries: text by id.
        qrels: by split ("train", "dev", "test", or as the set has them), grades by query and document.
        excluded: documents that are taken out of a query's ranking before it is scored (BRIGHT).
        drop_query_id: whether a document with the id of its query is taken out (BEIR does).
        min_grade: least grade that is relevant for measures other than nDCG (TREC DL: 2).
        source: tells whether the documents have changed since an index was made.
        document_of: the judged document of a passage, where passages are ranked (CRUMB): a document has the
            rank of its best passage (MaxP). None: what is ranked is what is judged.
        binary: by split as `qrels`, of other judgments for measures other than nDCG (CRUMB).
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    queries: Mapping[str, str]
    qrels: Mapping[str, Qrels]
    excluded: Mapping[str, frozenset[str]] = field(default_factory=dict)
    drop_query_id: bool = True
    min_grade: int = 1
    source: list[Any] | None = None
    document_of: Callable[[str], str] | None = None
    binary: Mapping[str, Qrels] = field(default_factory=dict)

    def judged_id(self, name: str) -> str:
        """What is judged of a document with this id: itself, or the document of a passage."""
        return name if self.document_of is None else self.document_of(name)

    def judged(self, split: str) -> Qrels:
        """Grades of the queries of a split; raises UserError where there is no such split."""
        if split not in self.qrels:
            raise UserError(
                f"{self.name} has no split {split!r}{nearest(split, self.qrels)}; it has "
                f"{', '.join(self.qrels)}: set folds to make some of its queries training ones"
            )
        return self.qrels[split]

    def folds(self, k: int, fold: int, seed: int = 0) -> Collection:
        """The same with the queries of all splits dealt to `k` folds: one is "test", the next one is "dev".

        The rest is "train". Two folds have no "dev".

        Raises:
            UserError: fewer than two folds, or more than queries; or no such fold.
        """
        merged = _merged(self.qrels)
        if not 2 <= k <= len(merged) or not 0 <= fold < k:
            raise UserError(f"{self.name}: fold {fold} of {k}: take 2 to {len(merged)} folds, from 0")
        order = sorted(merged)
        random.Random(seed).shuffle(order)
        part = {query: (i - fold) % k for i, query in enumerate(order)}
        names = {0: "test", 1: "dev"} if k > 2 else {0: "test"}
        qrels: dict[str, Qrels] = {"train": {}, "dev": {}, "test": {}}
        for query in order:
            qrels[names.get(part[query], "train")][query] = merged[query]
        kept = {split: found for split, found in qrels.items() if found}
        other = _merged(self.binary)
        binary = {
            split: {query: other[query] for query in found if query in other} for split, found in kept.items()
        }
        return replace(self, qrels=kept, binary=binary if other else {})


def _merged(splits: Mapping[str, Qrels]) -> Qrels:
    merged: Qrels = {}
    for judged in splits.values():
        for query, grades in judged.items():
            merged.setdefault(query, {}).update(grades)
    return merged


def check_judged(name: str, where: Mapping[str, str], documents: Iterable[Document]) -> None:
    """Raise UserError where a document that a query was judged on is not in the collection.

    Args:
        name: the collection's, for the message.
        where: file and line of one judgment of each judged document, by id.
        documents: all of them, read once; their ids are not kept.
    """
    missing = set(where)
    for document in documents:
        missing.discard(document.id)
    if missing:
        first = min(missing, key=where.__getitem__)
        raise UserError(
            f"{where[first]}: the document {first!r} is not in {name} ({len(missing)} such in all)"
        )
