"""A test collection: documents, queries, and judgments of which documents are relevant to which query.

`rlkit.retrieval.collections.load` opens one by name: a folder in BEIR's layout (`corpus.jsonl`,
`queries.jsonl`, `qrels/SPLIT.tsv`) or in T2Ranking's, `ir_datasets:NAME` for any dataset of ir-datasets,
`bright:SUBSET`, `crumb:TASK`, or `generated:SIZE:SEED`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlkit.errors import UserError, nearest
from rlkit.retrieval.documents import Document

Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Collection:
    """Documents, queries and relevance judgments.

    Attributes:
        name: Name for messages and ids.
        documents: Function that iterates over the documents, which need not fit in memory.
        queries: Query texts by id.
        qrels: Grades by split, query and document. Splits are "train", "dev", "test" or the dataset's own.
        excluded: Ids of documents to remove from each query's ranking before scoring (BRIGHT).
        drop_query_id: Whether to remove the document whose id equals the query's from its ranking (BEIR's
            ArguAna and Quora).
        min_grades: Minimum grade that counts as relevant, by kind of measure ("rr", "ap", "recall",
            "precision", "hit"). 1 for a kind that is not in it.
        source: JSON value that changes with the documents, so that an outdated index is rebuilt.
        document_of: Function from a passage's id to its document's, if passages are ranked but documents
            judged (CRUMB). A document takes the rank of its best passage (MaxP). None if both are the same.
        binary: Separate judgments for measures other than nDCG, in the form of `qrels` (CRUMB).
        notes: Sentences about what differs from the files or from the benchmark's own evaluation, such as the
            number of judged documents that the corpus does not have. They are shown to the user.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    queries: Mapping[str, str]
    qrels: Mapping[str, Qrels]
    excluded: Mapping[str, frozenset[str]] = field(default_factory=dict)
    drop_query_id: bool = False
    min_grades: Mapping[str, int] = field(default_factory=dict)
    source: list[Any] | None = None
    document_of: Callable[[str], str] | None = None
    binary: Mapping[str, Qrels] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def judged_id(self, name: str) -> str:
        """Return the id under which a retrieved document is judged, which differs for passages."""
        return name if self.document_of is None else self.document_of(name)

    def judged(self, split: str) -> Qrels:
        """Return the grades of a split by query and document; raises UserError if there is no such split."""
        if split not in self.qrels:
            raise UserError(
                f"{self.name} has no split {split!r}{nearest(split, self.qrels)}; it has "
                f"{', '.join(self.qrels)}. Set folds to use part of its queries for training"
            )
        return self.qrels[split]

    def folds(self, k: int, fold: int, seed: int = 0) -> Collection:
        """Return the collection with new splits from `k`-fold cross-validation over all of its queries.

        Fold `fold` becomes "test", the next one "dev", all others "train". With two folds there is no "dev".

        Raises:
            UserError: `k` is below 2 or above the number of queries, or `fold` is not in [0, k).
        """
        merged = _merge_splits(self.qrels)
        if not 2 <= k <= len(merged) or not 0 <= fold < k:
            raise UserError(
                f"{self.name}: folds={k} with fold={fold} is out of range; folds must be from 2 to "
                f"{len(merged)} (the number of queries) and fold from 0 to folds - 1"
            )
        order = sorted(merged)
        random.Random(seed).shuffle(order)
        offsets = {query: (i - fold) % k for i, query in enumerate(order)}
        names = {0: "test", 1: "dev"} if k > 2 else {0: "test"}
        splits: dict[str, Qrels] = {"train": {}, "dev": {}, "test": {}}
        for query in order:
            splits[names.get(offsets[query], "train")][query] = merged[query]
        qrels = {split: judged for split, judged in splits.items() if judged}

        merged_binary = _merge_splits(self.binary)
        binary: dict[str, Qrels] = {}
        if merged_binary:
            for split, judged in qrels.items():
                binary[split] = {query: merged_binary[query] for query in judged if query in merged_binary}
        return replace(self, qrels=qrels, binary=binary)


def _merge_splits(splits: Mapping[str, Qrels]) -> Qrels:
    merged: Qrels = {}
    for judged in splits.values():
        for query, grades in judged.items():
            merged.setdefault(query, {}).update(grades)
    return merged


def check_judged_documents(name: str, locations: Mapping[str, str], documents: Iterable[Document]) -> None:
    """Raise UserError if a judged document is missing from the collection.

    Args:
        name: Name of the collection, for the message.
        locations: File and line of a judgment of each judged document, by document id.
        documents: All documents, read once. Only the judged ids are held in memory.
    """
    missing = set(locations)
    for document in documents:
        missing.discard(document.id)
    if missing:
        first = min(missing, key=locations.__getitem__)
        raise UserError(
            f"{locations[first]}: the judged document {first!r} is not in {name} ({len(missing)} missing in "
            "total)"
        )
