"""BRIGHT (arXiv 2407.12883) and CRUMB (arXiv 2509.07253) from the hub, or from a local copy of it.

`bright:biology` and `crumb:legal_qa`; a folder with the data set's own layout after another colon takes the
place of the hub: `bright:biology:data/BRIGHT`. Both have queries to evaluate on; take `folds` to train.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlkit.errors import UserError, nearest
from rlkit.retrieval.collections.base import Collection, Qrels, check_judged
from rlkit.retrieval.documents import Document
from rlkit.retrieval.reading import read_hub

BRIGHT = (
    "biology",
    "earth_science",
    "economics",
    "psychology",
    "robotics",
    "stackoverflow",
    "sustainable_living",
    "leetcode",
    "pony",
    "aops",
    "theoremqa_theorems",
    "theoremqa_questions",
)
# Tasks of CRUMB, and whether passages are ranked but documents judged.
CRUMB = {
    "clinical_trial": True,
    "code_retrieval": False,
    "legal_qa": False,
    "paper_retrieval": False,
    "set_operation_entity_retrieval": True,
    "stack_exchange": False,
    "theorem_retrieval": False,
    "tip_of_the_tongue": True,
}


def load_bright(words: str) -> Collection:
    """A subset of BRIGHT: its gold ids are relevant, its excluded ids are taken out of rankings.

    Raises:
        UserError: no such subset or data set, or its rows are others.
    """
    subset, dataset = _subset(words, BRIGHT, "BRIGHT", "xlangai/BRIGHT")
    queries: dict[str, str] = {}
    qrels: Qrels = {}
    excluded = {}
    where: dict[str, str] = {}
    for i, row in enumerate(read_hub(dataset, "examples", subset)):
        place = f"{dataset}, examples of {subset}, row {i}"
        name, text, gold, out = _values(row, ("id", "query", "gold_ids", "excluded_ids"), place)
        if name in queries:
            raise UserError(f"{place}: {name!r} repeats; make the ids differ")
        if both := set(gold) & set(out):
            raise UserError(f"{place}: {min(both)!r} is both gold and excluded")
        queries[name], qrels[name] = text, dict.fromkeys(gold, 1)
        excluded[name] = frozenset(out) - {"N/A"}
        where |= {document: place for document in gold if document not in where}
    corpus = _Corpus(dataset, "documents", subset, ("id", "content"))
    check_judged(f"bright:{subset}", where, corpus())
    return Collection(
        f"bright:{subset}", corpus, queries, {"test": qrels}, excluded, source=["bright", dataset, subset]
    )


def load_crumb(words: str) -> Collection:
    """A task of CRUMB over its passages; where documents are judged, each has the rank of its best passage.

    Grades are cut to whole numbers, as the official evaluation does.

    Raises:
        UserError: no such task or data set, or its rows are others.
    """
    subset, dataset = _subset(words, CRUMB, "CRUMB", "jfkback/crumb")
    best_passage = CRUMB[subset]
    column = "full_document_qrels" if best_passage else "passage_qrels"
    queries: dict[str, str] = {}
    qrels: dict[str, Qrels] = {}
    binary: dict[str, Qrels] = {}
    where: dict[str, str] = {}
    for split, config in (("test", "evaluation_queries"), ("dev", "validation_queries")):
        for i, row in enumerate(read_hub(dataset, config, subset)):
            place = f"{dataset}, {config} of {subset}, row {i}"
            name, text, judged = _values(row, ("query_id", "query_content", column), place)
            if name in queries:
                raise UserError(f"{place}: {name!r} repeats; make the ids differ")
            queries[name] = text
            qrels.setdefault(split, {})[name] = _labels(judged)
            if row.get("passage_binary_qrels") and not best_passage:
                binary.setdefault(split, {})[name] = _labels(row["passage_binary_qrels"])
            where |= {one: place for one in qrels[split][name] if one not in where}
    corpus = _Corpus(dataset, "passage_corpus", subset, ("document_id", "document_content"))
    document_of = before_colon if best_passage else None
    made = Collection(
        f"crumb:{subset}",
        corpus,
        queries,
        qrels,
        source=["crumb", dataset, subset],
        document_of=document_of,
        binary=binary,
    )
    check_judged(made.name, where, (Document(made.judged_id(d.id), "", "") for d in corpus()))
    return made


def before_colon(passage: str) -> str:
    """The document of a passage of CRUMB."""
    return passage.partition(":")[0]


def _labels(judged: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    return {one["id"]: int(one["label"]) for one in judged}


def _subset(words: str, known: Iterable[str], what: str, hub: str) -> tuple[str, str]:
    subset, _, folder = words.partition(":")
    if subset not in known:
        raise UserError(f"{what} has no {subset!r}{nearest(subset, known)}; it has {', '.join(known)}")
    return subset, folder or hub


def _values(row: Mapping[str, Any], columns: Iterable[str], place: str) -> list[Any]:
    if missing := [name for name in columns if row.get(name) is None]:
        raise UserError(f"{place} has no {' and no '.join(missing)}")
    return [row[name] for name in columns]


class _Corpus:
    """Reads documents from Arrow, so that they need not fit in memory."""

    def __init__(self, dataset: str, config: str, split: str, columns: tuple[str, str]):
        self.place = (dataset, config, split)
        self.columns = columns

    def __call__(self) -> Iterator[Document]:
        from rlkit.retrieval.reading import open_hub

        rows = open_hub(*self.place)
        for i, row in enumerate(rows):
            name, text = _values(row, self.columns, f"{', '.join(self.place)}, row {i}")
            yield Document(str(name), "", text)
