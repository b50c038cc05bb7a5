"""A collection: documents, queries, and which documents are relevant to which query.

By name: a folder in the layout of BEIR (`corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv`) or of T2Ranking,
`ir_datasets:NAME` for any set of ir-datasets, `bright:SUBSET`, `crumb:TASK` (`envs.ranking.hub`), or
`generated:SIZE:SEED` (`envs.ranking.generated`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from envs.search.engines import Document
from rlkit.errors import UserError, nearest

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


def load_collection(name: str) -> Collection:
    """Load a collection by its name.

    Raises:
        UserError: there is none of that name, or a file of it is wrong; it names file and line.
    """
    if name.startswith("generated:"):
        from envs.ranking.generated import generate

        return generate(*_numbers(name))
    if name.startswith(("bright:", "crumb:")):
        from envs.ranking.hub import load_bright, load_crumb

        kind, _, words = name.partition(":")
        return (load_bright if kind == "bright" else load_crumb)(words)
    if name.startswith("ir_datasets:"):
        from envs.ranking.irds import load_irds

        return load_irds(name.removeprefix("ir_datasets:"))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"there is no collection {name!r}: give a folder, generated:SIZE:SEED, ir_datasets:NAME, "
            "bright:SUBSET or crumb:TASK"
        )
    from envs.ranking.files import load_beir, load_t2ranking

    return load_t2ranking(folder) if (folder / "collection.tsv").exists() else load_beir(folder)


def _numbers(name: str) -> tuple[int, int]:
    try:
        size, seed = map(int, name.split(":")[1:])
    except ValueError:
        raise UserError(f"{name!r}: write generated:SIZE:SEED, for example generated:2000:0") from None
    return size, seed


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
