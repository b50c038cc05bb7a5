"""Collections of ir-datasets, by name: https://ir-datasets.com. They are downloaded on first use."""

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
    """Load a set of ir-datasets: "beir/scifact" with its splits, or one of them, "beir/scifact/test".

    TREC DL's binary measures count grades from 2 on.

    Raises:
        UserError: the package is missing, there is no such set, or it has no documents or judgments.
    """
    try:
        import ir_datasets
    except ImportError:
        raise UserError("ir-datasets is not installed: pip install ir-datasets") from None
    try:
        whole = ir_datasets.load(name)
    except KeyError:
        raise UserError(f"ir-datasets has no set {name!r}: see https://ir-datasets.com") from None
    parts = {"test": whole} if whole.has_qrels() else _parts(ir_datasets, name)
    if not parts or not whole.has_docs():
        raise UserError(f"ir-datasets' {name!r} has no documents with judged queries: name a part of it")
    queries: dict[str, str] = {}
    qrels: dict[str, Qrels] = {}
    for split, part in parts.items():
        queries |= {query.query_id: _text(query) for query in part.queries_iter()}
        for one in part.qrels_iter():
            qrels.setdefault(split, {}).setdefault(one.query_id, {})[one.doc_id] = int(one.relevance)
    grade = 2 if "trec-dl" in name else 1
    return Collection(
        name, lambda: _documents(whole), queries, qrels, min_grade=grade, source=["ir_datasets", name]
    )


def _parts(package: ModuleType, name: str) -> dict[str, ir_datasets.Dataset]:
    """The parts of a set that are named as splits and are judged."""
    found = {}
    for split in SPLITS:
        try:
            part = package.load(f"{name}/{split}")
        except KeyError:
            continue
        if part.has_qrels():
            found["dev" if split == "validation" else split] = part
    return found


def _documents(whole: ir_datasets.Dataset) -> Iterator[Document]:
    for one in whole.docs_iter():
        title = getattr(one, "title", "") or ""
        text = getattr(one, "text", None) or one.default_text()
        yield Document(one.doc_id, title, text)


def _text(query: Any) -> str:
    return getattr(query, "text", None) or query.default_text()
