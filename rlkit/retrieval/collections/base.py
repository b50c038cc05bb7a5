"""A test collection: documents, queries, and judgments of which documents are relevant to which query.

`rlkit.retrieval.collections.load` opens one by name: a folder in BEIR's layout (`corpus.jsonl`,
`queries.jsonl`, `qrels/SPLIT.tsv`), one of its qrels files, a folder in T2Ranking's layout,
`ir_datasets:NAME` for any dataset of ir-datasets, `bright:SUBSET`, `crumb:TASK`, or `generated:SIZE:SEED`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlkit.errors import UserError, nearest
from rlkit.retrieval.documents import Document

Qrels = dict[str, dict[str, int]]
# BEIR evaluates these two without the document whose id is the query's: ArguAna's queries are taken from its
# corpus, and Quora's are questions of it.
DROP_QUERY_ID = ("arguana", "quora")
SPLIT_NAMES = {
    "training": "train",
    "development": "dev",
    "valid": "dev",
    "validation": "dev",
    "val": "dev",
    "testing": "test",
}


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
            others = self.qrels.keys() - {"train", "dev", "test"}
            by_file = (
                f", or give the path of its file qrels/{min(others)}.tsv as the collection" if others else ""
            )
            usual = [name for name in ("test", "dev", "train") if name in self.qrels]
            by_split = f"set evaluation_split to {usual[0]}, or " if split != "train" and usual else ""
            raise UserError(
                f"{self.name} has no split {split!r}{nearest(split, self.qrels)}; it has "
                f"{', '.join(self.qrels)}: {by_split}set folds to split all of its queries into train, dev "
                f"and test{by_file}"
            )
        return self.qrels[split]

    def min_grade(self, kind: str) -> int:
        """Return the minimum relevant grade of a kind of measure. R-precision has that of precision."""
        return max(self.min_grades.get("precision" if kind == "rprec" else kind, 1), 1)

    def folds(self, k: int, fold: int, seed: int = 0) -> Collection:
        """Return the collection with new splits from `k`-fold cross-validation over all of its queries.

        Fold `fold` becomes "test", the next one "dev", all others "train". With two folds there is no "dev".

        Raises:
            UserError: `k` is below 2 or above the number of queries, or `fold` is not in [0, k).
        """
        merged = merge_splits(self.qrels)
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

        merged_binary = merge_splits(self.binary)
        binary: dict[str, Qrels] = {}
        if merged_binary:
            for split, judged in qrels.items():
                binary[split] = {query: merged_binary[query] for query in judged if query in merged_binary}
        return replace(self, qrels=qrels, binary=binary)


def canonical_split(name: str) -> str:
    """Return "train", "dev" or "test" for the usual spellings of a split, and other names as they are."""
    lowered = name.lower()
    return SPLIT_NAMES.get(lowered, lowered if lowered in SPLIT_NAMES.values() else name)


def drops_query_id(name: str) -> bool:
    """Return whether a dataset, named by its path, is one of BEIR's that drop the query's own document."""
    return not {*name.lower().split("/")}.isdisjoint(DROP_QUERY_ID)


def merge_splits(splits: Mapping[str, Qrels]) -> Qrels:
    """Return the grades of all splits by query and document."""
    merged: Qrels = {}
    for judged in splits.values():
        for query, grades in judged.items():
            merged.setdefault(query, {}).update(grades)
    return merged


def check_judgments(
    name: str, qrels: Mapping[str, Qrels], queries: Mapping[str, str], document_ids: Iterable[str] | None
) -> tuple[dict[str, Qrels], list[str]]:
    """Return the judgments of known queries, and sentences about those that have no query or no document.

    Judgments of unknown queries are dropped. Those of documents that the corpus does not have are kept: as in
    trec_eval, a relevant document counts in the ideal ranking and in recall even if it cannot be retrieved.

    Args:
        name: Name of the collection, for messages.
        qrels: Grades by split, query and document.
        queries: Query texts by id.
        document_ids: Ids of all documents under which they are judged, read once; only judged ids are held
            in memory. None skips the comparison.

    Raises:
        UserError: There are no judgments, or none of the judged queries or none of the judged documents is in
            the collection, so the files do not belong together.
    """
    judged_queries = {query for judged in qrels.values() for query in judged}
    unknown = judged_queries - queries.keys()
    if not judged_queries:
        raise UserError(f"{name} has no judgments")
    if unknown == judged_queries:
        raise UserError(
            f"{name}: none of the {len(unknown)} judged queries is among its queries: the judgments have ids "
            f"such as {min(unknown)!r}, the queries {_example(queries)}; do the files belong together?"
        )
    notes = []
    if unknown:
        notes.append(
            f"{len(unknown)} of {len(judged_queries)} judged queries have no text, for example "
            f"{min(unknown)!r}; their judgments are ignored"
        )
    answerable = {}
    for split, judged in qrels.items():
        with_text = {query: grades for query, grades in judged.items() if query in queries}
        if with_text:
            answerable[split] = with_text
    if document_ids is not None:
        notes += _note_missing_documents(name, answerable, document_ids)
    return answerable, notes


def _note_missing_documents(name: str, qrels: Mapping[str, Qrels], document_ids: Iterable[str]) -> list[str]:
    relevant: dict[str, bool] = {}
    for judged in qrels.values():
        for grades in judged.values():
            for document, grade in grades.items():
                relevant[document] = relevant.get(document, False) or grade > 0
    missing = set(relevant)
    first = None
    for document in document_ids:
        first = document if first is None else first
        missing.discard(document)
    if not missing:
        return []
    if len(missing) == len(relevant):
        raise UserError(
            f"{name}: none of the {len(missing)} judged documents is in the corpus: the judgments have ids "
            f"such as {min(missing)!r}, the corpus {_example([] if first is None else [first])}; do the "
            "files belong together?"
        )
    num_relevant = sum(relevant[document] for document in missing)
    return [
        f"{len(missing)} of {len(relevant)} judged documents are not in the corpus, for example "
        f"{min(missing)!r}; the relevant ones ({num_relevant}) count in the ideal ranking, as in trec_eval"
    ]


def _example(ids: Iterable[str]) -> str:
    return next((f"such as {name!r}" for name in ids), "are empty")
