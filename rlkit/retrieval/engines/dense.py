"""Dense retrieval: sentence-transformers embeddings and exact nearest-neighbor search with FAISS.

`dense/embeddings.npy` holds a float32 unit vector for each document. FAISS compares a query with all of them
(inner product of unit vectors, so the cosine) directly in the memory-mapped file, without a copy in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.cache import write_json
from rlkit.retrieval.documents import Query, Result, check_k, full_text
from rlkit.retrieval.encoders import encode, load_encoder
from rlkit.retrieval.store import DocumentStore, Progress, damaged_index, read_header

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FOLDER = "dense"
EMBEDDINGS = "embeddings.npy"
STATE = "state.json"
BLOCK = 1024  # documents that are encoded between two writes of the state


def build(
    folder: Path,
    progress: Progress,
    model: str = "",
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
) -> dict[str, Any]:
    """Encode the documents of a folder and return the settings.

    An interrupted build resumes after its last complete block if documents and settings are the same.

    Args:
        folder: Folder with documents (`rlkit.retrieval.store.write_documents`).
        progress: Progress bar.
        model: Name or path of a sentence-transformers model.
        query_prefix: Prefix of queries; None uses the model's own prompt.
        passage_prefix: Prefix of documents; None uses the model's own prompt.

    Raises:
        UserError: No model is given, or it cannot be loaded.
    """
    if not model:
        raise UserError("a dense index needs an encoder: set model, for example intfloat/e5-base-v2")
    # The index may be opened from another working directory.
    model = str(Path(model).resolve()) if Path(model).exists() else model
    settings = {"model": model, "query_prefix": query_prefix, "passage_prefix": passage_prefix}
    store, encoder = DocumentStore(folder), load_encoder(model)
    state = {"fingerprint": store.fingerprint, "settings": settings}
    (folder / FOLDER).mkdir(exist_ok=True)
    vectors, num_encoded = _open_embeddings(folder / FOLDER, (len(store), _dimensions(encoder)), state)
    blocks = range(num_encoded, len(store), BLOCK)
    for start in progress(blocks, "embeddings", len(blocks)):
        stop = min(start + BLOCK, len(store))
        texts = [full_text(store[row]) for row in range(start, stop)]
        vectors[start:stop] = encode(encoder.encode_document, texts, passage_prefix)
        # The vectors must be on disk before the state says so, or a crash could leave zeros as embeddings.
        vectors.flush()
        write_json(folder / FOLDER / STATE, {**state, "done": stop})
    return settings


def _dimensions(encoder: SentenceTransformer) -> int:
    return encode(encoder.encode_query, ["one"], "").shape[1]


def _open_embeddings(folder: Path, shape: tuple[int, int], state: dict[str, Any]) -> tuple[np.memmap, int]:
    """Open the embeddings of an interrupted build with the same state, or create the file.

    Returns:
        The memory-mapped array and the number of rows that are already encoded.
    """
    try:
        saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
        vectors = np.lib.format.open_memmap(folder / EMBEDDINGS, mode="r+")
        if saved == {**state, "done": saved["done"]} and vectors.shape == shape:
            return vectors, saved["done"]
    except (OSError, ValueError, KeyError):
        pass
    (folder / STATE).unlink(missing_ok=True)
    return np.lib.format.open_memmap(folder / EMBEDDINGS, mode="w+", dtype=np.float32, shape=shape), 0


class Dense:
    """Exact search for the documents with the highest cosine similarity. An empty query has no results.

    Args:
        folder: Folder made by `rlkit.retrieval.engines.index.build_index`.

    Raises:
        UserError: The folder is not a dense index, or its encoder cannot be loaded.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.documents = DocumentStore(folder)
        try:
            settings = read_header(folder)["settings"]
            self._prefix, model = settings["query_prefix"], settings["model"]
            self._vectors = np.load(folder / FOLDER / EMBEDDINGS, mmap_mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise damaged_index(folder, FOLDER) from error
        self._encoder = load_encoder(model)
        if self._vectors.shape != (len(self.documents), _dimensions(self._encoder)):
            raise damaged_index(folder, FOLDER)

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return the `k` nearest documents of each query, or all of them if the index has fewer.

        Raises:
            EngineError: The encoder fails.
        """
        check_k(k)
        # A result is immutable, so empty queries can share one.
        results = [Result()] * len(queries)
        nonempty = [i for i, query in enumerate(queries) if query.text.strip()]
        if nonempty:
            texts = [queries[i].text for i in nonempty]
            vectors = encode(self._encoder.encode_query, texts, self._prefix)
            for i, result in zip(nonempty, self._nearest(vectors, k), strict=True):
                results[i] = result
        return results

    def _nearest(self, vectors: np.ndarray, k: int) -> list[Result]:
        import faiss

        scores, rows = faiss.knn(vectors, self._vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        return [self._result(*hits) for hits in zip(scores, rows, strict=True)]

    def _result(self, scores: np.ndarray, rows: np.ndarray) -> Result:
        # FAISS fills up with row -1 if there are fewer than k documents, and orders ties arbitrarily.
        order = [i for i in np.lexsort((rows, -scores)) if rows[i] >= 0]
        documents = tuple(self.documents[rows[i]] for i in order)
        return Result(documents, tuple(float(scores[i]) for i in order))
