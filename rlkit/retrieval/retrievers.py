"""Retrievers: search engines over a judged collection, whose index is built on first use and cached.

A retriever is named "bm25" or "bm25:LANGUAGE"; "dense:MODEL" with any sentence-transformers model;
"hybrid:MODEL", which fuses BM25 and the model by reciprocal rank; "rerank:FIRST|MODEL@DEPTH", which reranks
the first documents of another retriever with a cross-encoder; "docid:MODEL", a language model that writes the
identifiers of documents; the folder of an index; or the URL of a server that speaks Search-R1's protocol.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlkit.errors import UserError
from rlkit.retrieval.cache import collection_digest, locked_cache_path
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.cross_encoders import load_cross_encoder
from rlkit.retrieval.documents import Document, EngineError, Query, Result, SearchEngine, search_ids
from rlkit.retrieval.engines.bm25 import ENGLISH, resolve_language
from rlkit.retrieval.engines.dense import OutdatedIndexError
from rlkit.retrieval.engines.hybrid import Hybrid
from rlkit.retrieval.engines.identify import open_identifier
from rlkit.retrieval.engines.index import build_index, open_index
from rlkit.retrieval.engines.open import open_engine
from rlkit.retrieval.engines.rerank import Reranker

logger = logging.getLogger(__name__)

MAX_EMPTY_SHARE = 0.2  # of the queries, above which results without documents are probably not intended
RERANK_DEPTH = 100  # documents that a cross-encoder reranks, unless the name of the retriever says otherwise
PASSAGES_PER_DOCUMENT = 10  # retrieved for each document, since several passages may belong to one document


def open_retriever(name: str, collection: Collection) -> SearchEngine:
    """Open a retriever by name over a collection, building its index if the cache does not have it.

    Raises:
        UserError: The retriever is unknown, or its index or model cannot be opened.
    """
    kind, colon, model = name.partition(":")
    if has_own_documents(name):
        return open_engine(name, None, {})
    if kind == "rerank":
        first, model, depth = parse_reranker(model)
        reranker = load_cross_encoder(model)  # before an index is built that may take hours
        return Reranker(open_retriever(first, collection), reranker, depth)
    if kind == "docid" and model:
        return open_identifier(model, collection)
    if kind == "bm25" and (model or not colon):
        language = resolve_language(model or ENGLISH)
        settings = {} if language == ENGLISH else {"language": language}
        return open_index(cached_index(collection, "bm25", **settings))
    if kind not in ("dense", "hybrid") or not model:
        raise UserError(
            f"there is no retriever {name!r}; use bm25, bm25:LANGUAGE, dense:MODEL, hybrid:MODEL, "
            "rerank:FIRST|MODEL@DEPTH, docid:MODEL, an index folder or a URL (or, in `rlkit eval`, a TREC "
            "run file)"
        )
    try:
        dense = open_index(cached_index(collection, "dense", model=model), model=model)
    except OutdatedIndexError:
        # Loading the model has downloaded a newer revision than the one in the hub's cache, or the folder was
        # retrained at this moment.
        dense = open_index(cached_index(collection, "dense", model=model), model=model)
    if kind == "dense":
        return dense
    return Hybrid([open_index(cached_index(collection, "bm25")), dense])


def has_own_documents(name: str) -> bool:
    """Return whether a retriever is an index folder or a server. Its ids must be those of the collection.

    "bm25" is never a folder: one of this name is written `./bm25`.
    """
    is_folder = name != "bm25" and Path(name).expanduser().is_dir()
    return is_folder or name.startswith(("http://", "https://"))


def parse_reranker(text: str) -> tuple[str, str, int]:
    """Split `FIRST|MODEL` or `FIRST|MODEL@DEPTH` into the first retriever, the cross-encoder and the depth.

    Raises:
        UserError: One of them is missing.
    """
    first, _, model = text.rpartition("|")  # FIRST may be a reranker itself
    depth = RERANK_DEPTH
    if match := re.fullmatch(r"(.*)@(\d{1,7})", model):
        model, depth = match[1], int(match[2])
    if not first or not model or not depth:
        raise UserError(
            f"'rerank:{text}' must be rerank:FIRST|MODEL or rerank:FIRST|MODEL@DEPTH, in quotes because of "
            "the |, for example 'rerank:bm25|cross-encoder/ms-marco-MiniLM-L6-v2@100'"
        )
    return first, model, depth


def cached_index(collection: Collection, engine: str, **settings: Any) -> Path:
    """Return the cached index folder of a collection; the first process builds it while others wait.

    A model is identified by its files: after it is retrained, the documents are encoded again.
    """
    # Sorted: the order of keyword arguments must not change the key.
    others = sorted((name, value) for name, value in settings.items() if name != "model")
    models = [settings["model"]] if "model" in settings else []
    digest = collection_digest(collection, engine, others, by_words=engine == "bm25", models=models)
    with locked_cache_path(f"ranking-{digest}-{engine}") as folder:
        if not folder.exists():
            build_index(collection.documents(), folder, engine, **settings)
        return folder


def retrieve(
    engine: SearchEngine, collection: Collection, queries: Mapping[str, str], k: int
) -> dict[str, list[str]]:
    """Return a ranking of at most `k` judged ids per query, best first, without excluded documents.

    Raises:
        EngineError: The search failed for one of the queries.
    """
    searched = search_ids(engine, [Query(text) for text in queries.values()], search_depth(collection, k))
    rankings = {}
    for name, ranking in zip(queries, searched, strict=True):
        if ranking.error is not None:
            raise EngineError(ranking.error)
        rankings[name] = _top_ids(collection, name, ranking.ids, k)
    num_empty = sum(not ranking.ids for ranking in searched)
    warn_about_empty(num_empty, len(queries), type(engine).__name__)
    return rankings


def warn_about_empty(num_empty: int, num_queries: int, retriever: str) -> None:
    """Log a warning if the retriever found nothing for many of the queries."""
    if num_empty > MAX_EMPTY_SHARE * num_queries:
        logger.warning(
            "%s found no document for %d of %d queries. Check that the queries and documents are in the "
            "language of the retriever. Alternatives: bm25:LANGUAGE (such as bm25:german), bm25:none (no "
            "stemming, no stop words) and dense:MODEL",
            retriever,
            num_empty,
            num_queries,
        )


def _top_ids(collection: Collection, query: str, ids: Sequence[str], k: int) -> list[str]:
    """Return the first `k` judged ids of a ranking, without excluded ones.

    A document that is ranked by its passages takes the rank of its best one (MaxP); its others are dropped.
    """
    excluded = excluded_ids(collection, query)
    judged = dict.fromkeys(map(collection.judged_id, ids))
    return [name for name in judged if name not in excluded][:k]


def search_depth(collection: Collection, k: int) -> int:
    """Return how many documents to retrieve so that `k` remain after exclusions.

    If passages are ranked, `k` documents remain in most cases only: one document may have many passages.
    """
    max_excluded = max(map(len, collection.excluded.values()), default=0)
    depth = k if collection.document_of is None else PASSAGES_PER_DOCUMENT * k
    return depth + max_excluded + collection.drop_query_id


def top_documents(collection: Collection, query: str, result: Result, k: int) -> list[Document]:
    """Return the first `k` documents of a result, without excluded ones, under the ids that are judged.

    A document that is ranked by its passages is represented by the best one (MaxP).
    """
    names = _top_ids(collection, query, [document.id for document in result.documents], k)
    best: dict[str, Document] = {}
    for document in result.documents:
        best.setdefault(collection.judged_id(document.id), document)
    return [replace(best[name], id=name) for name in names]


def excluded_by_text(collection: Collection, queries: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the ids that are removed from the rankings of queries whose ids are unknown, by query text.

    Queries that are not in the collection, or that have no excluded documents, are left out.
    """
    excluded: dict[str, frozenset[str]] = {}
    if collection.excluded or collection.drop_query_id:
        texts = set(queries)
        for name, text in collection.queries.items():
            if text in texts:
                excluded[text] = excluded.get(text, frozenset()) | excluded_ids(collection, name)
    return excluded


def excluded_ids(collection: Collection, query: str) -> frozenset[str]:
    """Return the ids of the documents that are removed from a query's ranking."""
    excluded = collection.excluded.get(query, frozenset())
    return excluded | {query} if collection.drop_query_id else excluded
