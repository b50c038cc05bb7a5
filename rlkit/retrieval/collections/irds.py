"""Collections of ir-datasets (https://ir-datasets.com), which are downloaded on first use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection, Qrels
from rlkit.retrieval.documents import Document

if TYPE_CHECKING:
    from types import ModuleType

    import ir_datasets

SPLITS = ("train", "dev", "validation", "test")


def load_irds(name: str) -> Collection:
    """Load a dataset of ir-datasets with all of its splits ("beir/scifact"), or one split of it as "test".

    Grades of 2 and more count as relevant in TREC DL's binary measures.

    Raises:
        UserError: ir-datasets is not installed, the dataset is unknown, or it has no documents or judgments.
    """
    try:
        import ir_datasets
    except ImportError:
        raise UserError("ir-datasets is not installed: pip install ir-datasets") from None
    try:
        dataset = ir_datasets.load(name)
    except KeyError:
        raise UserError(f"ir-datasets has no dataset {name!r}; see https://ir-datasets.com") from None
    splits = {"test": dataset} if dataset.has_qrels() else _judged_splits(ir_datasets, name)
    if not splits or not dataset.has_docs():
        raise UserError(
            f"{name!r} of ir-datasets has no documents or no judged queries; name one of its subsets"
        )
    queries: dict[str, str] = {}
    qrels: dict[str, Qrels] = {}
    for split, subset in splits.items():
        queries |= {query.query_id: _query_text(query) for query in subset.queries_iter()}
        for judgment in subset.qrels_iter():
            grades = qrels.setdefault(split, {}).setdefault(judgment.query_id, {})
            grades[judgment.doc_id] = int(judgment.relevance)
    # TREC DL's grade 1 means "related", not relevant.
    min_grades = dict.fromkeys(("rr", "ap", "recall", "precision"), 2) if "trec-dl" in name else {}
    return Collection(
        name,
        lambda: _documents(dataset),
        queries,
        qrels,
        min_grades=min_grades,
        source=["ir_datasets", name],
    )


def _judged_splits(package: ModuleType, name: str) -> dict[str, ir_datasets.Dataset]:
    """Return the subsets of a dataset that are named after a split and have judgments."""
    splits = {}
    for split in SPLITS:
        try:
            subset = package.load(f"{name}/{split}")
        # The registry raises KeyError for a split that a dataset does not have.
        except KeyError:
            continue
        if subset.has_qrels():
            splits["dev" if split == "validation" else split] = subset
    return splits


def _documents(dataset: ir_datasets.Dataset) -> Iterator[Document]:
    for document in dataset.docs_iter():
        title = getattr(document, "title", "") or ""
        text = getattr(document, "text", None) or document.default_text()
        yield Document(document.doc_id, title, text)


def _query_text(query: Any) -> str:
    # Fields differ between datasets. `default_text` joins those that a dataset considers searchable.
    return getattr(query, "text", None) or query.default_text()
