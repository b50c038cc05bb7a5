"""Retrievers over a collection: the search engines of `rlkit.retrieval.engines`, indexed on first use.

By name: "bm25"; "dense:MODEL" with any sentence-transformers model; "hybrid:MODEL", which fuses the two by
reciprocal rank; the folder of an index; or the URL of a server of Search-R1's protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlkit.errors import UserError
from rlkit.retrieval.cache import cached, collection_digest
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, EngineError, Query, Result, SearchEngine
from rlkit.retrieval.engines.hybrid import Hybrid
from rlkit.retrieval.engines.index import build_index, open_index
from rlkit.retrieval.engines.open import open_engine

PASSAGES = 10  # asked for, for a document


def open_retriever(name: str, collection: Collection) -> SearchEngine:
    """Open a retriever over a collection; raises UserError where it cannot be."""
    kind, _, model = name.partition(":")
    if name.startswith(("http://", "https://")) or Path(name).expanduser().is_dir():
        return open_engine(name, None, {})
    if name == "bm25":
        return open_index(index_of(collection, "bm25"))
    if kind not in ("dense", "hybrid") or not model:
        raise UserError(
            f"there is no retriever {name!r}: take bm25, dense:MODEL, hybrid:MODEL, a folder or a URL"
        )
    dense = open_index(index_of(collection, "dense", model=model))
    if kind == "dense":
        return dense
    return Hybrid([open_index(index_of(collection, "bm25")), dense])


def index_of(collection: Collection, engine: str, **settings: Any) -> Path:
    """A collection's index in the cache; the first process that asks builds it, others wait."""
    digest = collection_digest(collection, engine, sorted(settings.items()))
    with cached(f"ranking-{digest}-{engine}") as folder:
        if not folder.exists():
            build_index(collection.documents(), folder, engine, **settings)
        return folder


def retrieve(
    engine: SearchEngine, collection: Collection, queries: Mapping[str, str], k: int
) -> dict[str, list[str]]:
    """Rankings of at most `k` ids, best first, by query; what is excluded is not among them.

    Raises:
        EngineError: the engine cannot answer one of them.
    """
    results = engine.search([Query(text) for text in queries.values()], how_many(collection, k))
    found = {}
    for name, result in zip(queries, results, strict=True):
        if result.error is not None:
            raise EngineError(result.error)
        found[name] = [document.id for document in ranked(collection, name, result, k)]
    return found


def how_many(collection: Collection, k: int) -> int:
    """Documents to ask an engine for, so that `k` are left of them (of passages, most of the time)."""
    excluded = max(map(len, collection.excluded.values()), default=0)
    return (k if collection.document_of is None else PASSAGES * k) + excluded + collection.drop_query_id


def ranked(collection: Collection, query: str, result: Result, k: int) -> list[Document]:
    """The first `k` documents of a result that are not excluded, under the ids that are judged.

    Of passages each document has its first one: the others are left out (MaxP).
    """
    out = left_out(collection, query)
    found: dict[str, Document] = {}
    for document in result.documents:
        name = collection.judged_id(document.id)
        if name not in out and name not in found:
            found[name] = replace(document, id=name)
    return list(found.values())[:k]


def left_out(collection: Collection, query: str) -> frozenset[str]:
    """Documents that are taken out of a query's ranking."""
    own = {query} if collection.drop_query_id else set()
    return collection.excluded.get(query, frozenset()) | own
