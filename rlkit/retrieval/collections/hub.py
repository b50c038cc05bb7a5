"""BRIGHT (arXiv 2407.12883) and CRUMB (arXiv 2509.07253) from the Hugging Face Hub or a local copy.

Collections are named `bright:biology` or `crumb:legal_qa`. A local folder in the dataset's own layout can
follow after another colon: `bright:biology:data/BRIGHT`. Neither dataset has training queries; use `folds` to
train on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlkit.errors import UserError, nearest
from rlkit.retrieval.collections.base import Collection, Qrels, check_judgments
from rlkit.retrieval.collections.files import parse_grade
from rlkit.retrieval.documents import Document
from rlkit.retrieval.reading import hub_state, open_hub, read_hub

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
# Tasks of CRUMB, and whether documents are judged although passages are ranked (MaxP).
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


def load_bright(name: str) -> Collection:
    """Load `SUBSET` or `SUBSET:FOLDER` of BRIGHT. Gold ids are relevant; excluded ids are not ranked.

    Raises:
        UserError: The subset or dataset does not exist, or a row is invalid.
    """
    subset, dataset = _parse_name(name, BRIGHT, "BRIGHT", "xlangai/BRIGHT")
    queries: dict[str, str] = {}
    qrels: Qrels = {}
    excluded = {}
    for i, row in enumerate(read_hub(dataset, "examples", subset)):
        location = f"{dataset}, examples of {subset}, row {i}"
        query, text, gold, ids = _values(row, ("id", "query", "gold_ids", "excluded_ids"), location)
        if query in queries:
            raise UserError(f"{location}: the id {query!r} is a duplicate; make the ids unique")
        if overlap := set(gold) & set(ids):
            raise UserError(f"{location}: {min(overlap)!r} is listed both as relevant and as excluded")
        queries[query], qrels[query] = text, dict.fromkeys(gold, 1)
        excluded[query] = frozenset(ids) - {"N/A"}  # BRIGHT writes an empty list as ["N/A"]
    corpus = _HubCorpus(dataset, "documents", subset, ("id", "content"))
    ids = (document.id for document in corpus())
    splits, notes = check_judgments(f"bright:{subset}", {"test": qrels}, queries, ids)
    source = ["bright", dataset, subset, hub_state(*corpus.source)]
    return Collection(f"bright:{subset}", corpus, queries, splits, excluded, source=source, notes=notes)


def load_crumb(name: str) -> Collection:
    """Load `TASK` or `TASK:FOLDER` of CRUMB. A judged document takes the rank of its best passage (MaxP).

    Fractional grades are truncated to integers, as in the official evaluation.

    Raises:
        UserError: The task or dataset does not exist, or a row is invalid.
    """
    task, dataset = _parse_name(name, CRUMB, "CRUMB", "jfkback/crumb")
    judges_documents = CRUMB[task]
    column = "full_document_qrels" if judges_documents else "passage_qrels"
    queries: dict[str, str] = {}
    qrels: dict[str, Qrels] = {}
    binary: dict[str, Qrels] = {}
    for split, config in (("test", "evaluation_queries"), ("dev", "validation_queries")):
        for i, row in enumerate(read_hub(dataset, config, task)):
            location = f"{dataset}, {config} of {task}, row {i}"
            query, text, labels = _values(row, ("query_id", "query_content", column), location)
            if query in queries:
                raise UserError(f"{location}: the id {query!r} is a duplicate; make the ids unique")
            queries[query] = text
            qrels.setdefault(split, {})[query] = _grades(labels, location)
            if row.get("passage_binary_qrels") and not judges_documents:
                binary.setdefault(split, {})[query] = _grades(row["passage_binary_qrels"], location)
    corpus = _HubCorpus(dataset, "passage_corpus", task, ("document_id", "document_content"))
    document_of = crumb_document_id if judges_documents else None
    # Judgments name documents, so passages are compared by the id of their document.
    ids = (passage.id if document_of is None else document_of(passage.id) for passage in corpus())
    qrels, notes = check_judgments(f"crumb:{task}", qrels, queries, ids)
    return Collection(
        f"crumb:{task}",
        corpus,
        queries,
        qrels,
        source=["crumb", dataset, task, hub_state(*corpus.source)],
        document_of=document_of,
        binary=binary,
        notes=notes,
    )


def crumb_document_id(passage: str) -> str:
    """Return the document id of a CRUMB passage id, `DOCUMENT:NUMBER`."""
    return passage.partition(":")[0]


def _grades(labels: Iterable[Mapping[str, Any]], location: str) -> dict[str, int]:
    grades: dict[str, int] = {}
    for label in labels:
        grade = parse_grade(label["label"], location, truncate=True)
        if grades.setdefault(label["id"], grade) != grade:
            raise UserError(
                f"{location}: document {label['id']!r} has the grades {grades[label['id']]} and {grade}"
            )
    return grades


def _parse_name(name: str, subsets: Iterable[str], benchmark: str, hub_name: str) -> tuple[str, str]:
    """Split `SUBSET` or `SUBSET:FOLDER` into the subset and the dataset, which defaults to the Hub's."""
    subset, _, folder = name.partition(":")
    if subset not in subsets:
        raise UserError(
            f"{benchmark} has no subset {subset!r}{nearest(subset, subsets)}; it has {', '.join(subsets)}"
        )
    return subset, folder or hub_name


def _values(row: Mapping[str, Any], columns: Iterable[str], location: str) -> list[Any]:
    """Return the values of the columns; raises UserError if one is missing or null."""
    if missing := [name for name in columns if row.get(name) is None]:
        raise UserError(f"{location} has no {' and no '.join(missing)}")
    return [row[name] for name in columns]


class _HubCorpus:
    """Iterate over the documents of a Hub dataset. Arrow memory-maps them, so they need not fit in memory."""

    def __init__(self, dataset: str, config: str, split: str, columns: tuple[str, str]):
        self.source = (dataset, config, split)
        self.columns = columns

    def __call__(self) -> Iterator[Document]:
        for i, row in enumerate(open_hub(*self.source)):
            name, text = _values(row, self.columns, f"{', '.join(self.source)}, row {i}")
            yield Document(str(name), "", text)
