"""Dense retrieval: a sentence-transformers encoder, and the exact nearest passages by FAISS.

`dense/embeddings.npy` holds a unit vector of float32 for each document. FAISS compares queries with all
of them (inner product, so cosine) straight from the memory-mapped file: there is no second copy in memory.
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
from rlkit.retrieval.store import DocumentStore, Progress, damaged, read_header

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FOLDER = "dense"
EMBEDDINGS = "embeddings.npy"
STATE = "state.json"
BLOCK = 1024  # documents that are encoded between two notes of how far it is


def build(
    folder: Path,
    progress: Progress,
    model: str = "",
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
) -> dict[str, Any]:
    """Encode the documents of a folder and return the settings.

    Blocks that an interrupted build of the same documents with the same settings has written are kept.

    Raises:
        UserError: no model is given, or it cannot be loaded.
    """
    if not model:
        raise UserError("a dense index needs an encoder: give model, for example intfloat/e5-base-v2")
    model = str(Path(model).resolve()) if Path(model).exists() else model
    settings = {"model": model, "query_prefix": query_prefix, "passage_prefix": passage_prefix}
    collection, encoder = DocumentStore(folder), load_encoder(model)
    state = {"fingerprint": collection.fingerprint, "settings": settings}
    (folder / FOLDER).mkdir(exist_ok=True)
    vectors, done = _open_blocks(folder / FOLDER, (len(collection), _dimensions(encoder)), state)
    blocks = range(done, len(collection), BLOCK)
    for start in progress(blocks, "embeddings", len(blocks)):
        stop = min(start + BLOCK, len(collection))
        texts = [full_text(collection[row]) for row in range(start, stop)]
        vectors[start:stop] = encode(encoder.encode_document, texts, passage_prefix)
        vectors.flush()
        write_json(folder / FOLDER / STATE, {**state, "done": stop})
    return settings


def _dimensions(encoder: SentenceTransformer) -> int:
    return encode(encoder.encode_query, ["one"], "").shape[1]


def _open_blocks(folder: Path, shape: tuple[int, int], state: dict[str, Any]) -> tuple[np.memmap, int]:
    """The file of embeddings and how many are done: those of a build of the same documents and settings."""
    try:
        before = json.loads((folder / STATE).read_text(encoding="utf-8"))
        vectors = np.lib.format.open_memmap(folder / EMBEDDINGS, mode="r+")
        if before == {**state, "done": before["done"]} and vectors.shape == shape:
            return vectors, before["done"]
    except (OSError, ValueError, KeyError):
        pass
    (folder / STATE).unlink(missing_ok=True)
    return np.lib.format.open_memmap(folder / EMBEDDINGS, mode="w+", dtype=np.float32, shape=shape), 0


class Dense:
    """The documents with the nearest embeddings, by cosine. An empty query finds none.

    Args:
        folder: made by `rlkit.retrieval.engines.index.build_index`.

    Raises:
        UserError: the folder is no such index, or its encoder cannot be loaded.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.documents = DocumentStore(folder)
        try:
            settings = read_header(folder)["settings"]
            self._prefix, model = settings["query_prefix"], settings["model"]
            self._vectors = np.load(folder / FOLDER / EMBEDDINGS, mmap_mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise damaged(folder, FOLDER) from error
        self._encoder = load_encoder(model)
        if self._vectors.shape != (len(self.documents), _dimensions(self._encoder)):
            raise damaged(folder, FOLDER)

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return the k nearest documents for each query, in order; fewer where there are fewer.

        Raises:
            EngineError: the encoder fails.
        """
        check_k(k)
        results = [Result()] * len(queries)
        asked = [i for i, query in enumerate(queries) if query.text.strip()]
        if asked:
            texts = [queries[i].text for i in asked]
            vectors = encode(self._encoder.encode_query, texts, self._prefix)
            for i, result in zip(asked, self._nearest(vectors, k), strict=True):
                results[i] = result
        return results

    def _nearest(self, vectors: np.ndarray, k: int) -> list[Result]:
        import faiss

        scores, rows = faiss.knn(vectors, self._vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        return [self._result(*pair) for pair in zip(scores, rows, strict=True)]

    def _result(self, scores: np.ndarray, rows: np.ndarray) -> Result:
        order = [i for i in np.lexsort((rows, -scores)) if rows[i] >= 0]  # FAISS says -1 where there is none
        documents = tuple(self.documents[rows[i]] for i in order)
        return Result(documents, tuple(float(scores[i]) for i in order))
