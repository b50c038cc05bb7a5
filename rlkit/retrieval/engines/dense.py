"""Dense retrieval: sentence-transformers embeddings and exact nearest-neighbor search with FAISS.

`dense/embeddings.npy` holds a float32 vector for each document, of length 1 if the similarity is the cosine.
With `augment` or `train_queries`, the vectors are updated with queries for the documents
(`rlkit.retrieval.engines.document_queries`). FAISS computes the inner product of a query with all of them
directly in the memory-mapped file, without a copy in memory. The settings of the index have the fingerprint
of the encoder's files, because the vectors of another model, such as the one in the same folder after more
training, cannot be compared with these.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlkit.errors import UserError, check_choice, check_integer
from rlkit.files import replace, sync
from rlkit.models.fingerprint import model_fingerprint
from rlkit.retrieval.cache import write_json
from rlkit.retrieval.documents import Query, Ranking, Result, check_k, full_text
from rlkit.retrieval.encoders import encode, is_dot_product, load_encoder
from rlkit.retrieval.engines.approximate import LISTS, Hits, InvertedLists, build_lists, exact_neighbors
from rlkit.retrieval.engines.document_queries import (
    ALPHA,
    EPOCHS,
    DocumentQueries,
    fuse,
    read_document_queries,
    train_vectors,
)
from rlkit.retrieval.store import DocumentStore, Progress, damaged_index, read_header
from rlkit.words import first_words

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

FOLDER = "dense"
COSINE, DOT = "cosine", "dot"
EMBEDDINGS = "embeddings.npy"
PARTIAL = f"{EMBEDDINGS}.partial"
STATE = "state.json"
RECALL = 0.95  # that an approximate search shall have
NUM_SPANS, SPAN_WORDS, SPAN_CHARACTERS = 500, 8, 60  # of documents, as queries that measure the recall
BLOCK = 1024  # documents that are encoded between two writes of the state


class OutdatedIndexError(UserError):
    """The files of the encoder are not those that encoded the documents of the index."""


def build(
    folder: Path,
    progress: Progress,
    *,
    model: str = "",
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
    similarity: str | None = None,
    approximate: bool = False,
    recall: float | None = None,
    augment: str | Path | None = None,
    alpha: float | None = None,
    train_queries: str | Path | None = None,
    train_epochs: int | None = None,
) -> dict[str, Any]:
    """Encode the documents of a folder and return the settings.

    An interrupted build resumes after its last complete block if documents, settings and the files of the
    model are the same.

    Args:
        folder: Folder with documents (`rlkit.retrieval.store.write_documents`).
        progress: Progress bar.
        model: Name or path of a sentence-transformers model.
        query_prefix: Prefix of queries; None uses the model's own prompt.
        passage_prefix: Prefix of documents; None uses the model's own prompt.
        similarity: "cosine" or "dot", the inner product of vectors of any length; None uses the model's own.
        approximate: Whether to build an inverted file for approximate search.
        recall: Share of the exact neighbors that an approximate search shall find; None is 0.95.
        augment: Path of a table of queries to fuse into the vectors of their documents
            (`rlkit.retrieval.engines.document_queries`).
        alpha: Weight of each of these queries, 0 to 1; None is 0.01.
        train_queries: Path of a table of queries to train the vectors of their documents on, after `augment`.
        train_epochs: Number of passes over `train_queries`; None is 10.

    Raises:
        UserError: No model is given, it cannot be loaded, or a setting or the table is invalid.
    """
    if not model:
        raise UserError("a dense index needs an encoder: set model, for example intfloat/e5-base-v2")
    # The index may be opened from another working directory.
    model = str(Path(model).resolve()) if Path(model).exists() else model
    _check_settings(similarity, approximate, recall)
    _check_query_settings(augment, alpha, train_queries, train_epochs)
    store = DocumentStore(folder)
    # Read before the encoder is loaded, so that an invalid row is reported at once.
    augmentation = None if augment is None else read_document_queries(augment, store)
    training_queries = None if train_queries is None else read_document_queries(train_queries, store)
    encoder = load_encoder(model)
    settings: dict[str, Any] = {
        "model": model,
        "model_fingerprint": model_fingerprint(model),  # after loading, which may have downloaded it
        "query_prefix": query_prefix,
        "passage_prefix": passage_prefix,
        "similarity": similarity or _own_similarity(encoder, model),
    }
    if augmentation is not None:
        settings["augment"] = augmentation.settings(alpha=ALPHA if alpha is None else alpha)
    normalize = settings["similarity"] == COSINE
    if training_queries is not None and not normalize:
        raise UserError(f"train_queries needs the similarity cosine, not {settings['similarity']}")
    state = {"fingerprint": store.fingerprint, "settings": dict(settings)}  # without those added below
    final: np.ndarray = _encode_documents(
        folder / FOLDER, store, encoder, state, augmentation=augmentation, progress=progress
    )
    if training_queries is not None:
        embedded = encode(encoder.encode_query, training_queries.queries, query_prefix, True)
        epochs = EPOCHS if train_epochs is None else train_epochs
        final, losses = train_vectors(final, embedded, training_queries, epochs=epochs, progress=progress)
        settings["train"] = training_queries.settings(epochs=epochs, losses=losses)
    # An interrupted build of an approximate index may have left its lists.
    (folder / FOLDER / LISTS).unlink(missing_ok=True)
    if approximate:
        queries = encode(encoder.encode_query, sample_spans(store), query_prefix, normalize)
        target = RECALL if recall is None else recall
        settings["approximate"] = build_lists(folder / FOLDER, final, queries, target, progress)
    if training_queries is not None:
        # Last, so that an interrupted build keeps the vectors from before the training.
        _replace_embeddings(folder / FOLDER, final)
    return settings


def _encode_documents(
    folder: Path,
    store: DocumentStore,
    encoder: SentenceTransformer,
    state: dict[str, Any],
    *,
    augmentation: DocumentQueries | None,
    progress: Progress,
) -> np.memmap:
    """Return the memory-mapped vectors of all documents, after encoding those that are not in the file."""
    settings = state["settings"]
    normalize = settings["similarity"] == COSINE
    folder.mkdir(exist_ok=True)
    (folder / PARTIAL).unlink(missing_ok=True)  # of a build that was killed
    vectors, num_encoded = _open_embeddings(folder, (len(store), _dimensions(encoder)), state)
    blocks = range(num_encoded, len(store), BLOCK)
    for start in progress(blocks, "embeddings", len(blocks)):
        stop = min(start + BLOCK, len(store))
        texts = [full_text(store[row]) for row in range(start, stop)]
        block = encode(encoder.encode_document, texts, settings["passage_prefix"], normalize)
        if augmentation is not None:
            queries, rows = augmentation.of_block(start, stop)
            if queries:
                query_vectors = encode(encoder.encode_query, queries, settings["query_prefix"], normalize)
                block = fuse(block, query_vectors, rows, settings["augment"]["alpha"], normalize)
        vectors[start:stop] = block
        # The vectors must be on disk before the state says so, or a crash could leave zeros as embeddings.
        vectors.flush()
        write_json(folder / STATE, {**state, "done": stop})
    return vectors


def _replace_embeddings(folder: Path, vectors: np.ndarray) -> None:
    """Replace the vectors of an index atomically."""
    with (folder / PARTIAL).open("wb") as file:
        np.save(file, vectors)
    # A build must not resume from trained vectors, not even after a power failure.
    (folder / STATE).unlink()
    sync(folder)
    replace(folder / PARTIAL, folder / EMBEDDINGS)


def _check_settings(similarity: str | None, approximate: bool, recall: float | None) -> None:
    """Raise UserError if a setting is out of range, or has no effect."""
    if similarity is not None:
        check_choice("similarity", similarity, (COSINE, DOT))
    if recall is not None and not approximate:
        raise UserError("recall has no effect on an exact index: set approximate as well, or remove recall")
    if recall is not None and not 0 < recall < 1:
        raise UserError(f"recall must be above 0 and below 1, not {recall}")


def _check_query_settings(
    augment: str | Path | None,
    alpha: float | None,
    train_queries: str | Path | None,
    train_epochs: int | None,
) -> None:
    """Raise UserError if a setting of queries for documents is out of range, or has no effect."""
    if alpha is not None and augment is None:
        raise UserError("alpha has no effect without queries to fuse: set augment as well, or remove alpha")
    if alpha is not None and not 0 <= alpha <= 1:
        raise UserError(f"alpha must be from 0 to 1, not {alpha}")
    if train_epochs is not None and train_queries is None:
        raise UserError(
            "train_epochs has no effect without queries to train on: set train_queries as well, or remove "
            "train_epochs"
        )
    if train_epochs is not None:
        check_integer("train_epochs", train_epochs, 1)


def sample_spans(store: DocumentStore) -> list[str]:
    """Return short spans of sampled documents, as queries with which an approximate search is measured.

    A real query is short and not in the index, and so is a span. Whole documents would be closer to their
    neighbors than queries are, and show a higher recall.
    """
    rng = np.random.default_rng(0)
    spans = []
    for row in rng.permutation(len(store))[:NUM_SPANS]:
        text = full_text(store[row])
        start = int(rng.integers(max(1, len(text) - SPAN_CHARACTERS)))
        _, space, after_space = text[start:].partition(" ")
        at_word = after_space if start and space else text[start:]
        spans.append(first_words(at_word, SPAN_WORDS))
    return [span for span in spans if span] or ["document"]


def _own_similarity(encoder: SentenceTransformer, model: str) -> str:
    if is_dot_product(encoder):
        return DOT
    if encoder.similarity_fn_name != COSINE:
        logger.warning(
            "the similarity of %s is %s, for which rlkit has no index: the index uses the cosine",
            model,
            encoder.similarity_fn_name,
        )
    return COSINE


def _dimensions(encoder: SentenceTransformer) -> int:
    return encode(encoder.encode_query, ["one"], None).shape[1]


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
    """Search for the documents with the highest similarity, exact unless the index was built as approximate.

    An empty query has no results.

    Attributes:
        documents: The indexed documents.

    Args:
        folder: Folder made by `rlkit.retrieval.engines.index.build_index`.
        model: Name or path of a copy of the encoder; None uses the one that built the index.

    Raises:
        OutdatedIndexError: The files of the encoder are not those that built the index.
        UserError: The folder is not a dense index, or its encoder cannot be loaded.
    """

    def __init__(self, folder: str | Path, model: str | None = None):
        folder = Path(folder)
        self.documents = DocumentStore(folder)
        try:
            settings = read_header(folder)["settings"]
            self._prefix, model = settings["query_prefix"], model or settings["model"]
            self._vectors = np.load(folder / FOLDER / EMBEDDINGS, mmap_mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise damaged_index(folder, FOLDER) from error
        self._encoder = load_encoder(model)
        _check_fingerprint(folder, model, settings.get("model_fingerprint"))
        self._lists = self._open_lists(folder, settings.get("approximate"))
        # Older versions of rlkit built all indexes for the cosine.
        self._normalizes = settings.get("similarity", COSINE) == COSINE
        if self._vectors.shape != (len(self.documents), _dimensions(self._encoder)):
            raise damaged_index(folder, FOLDER)

    def _open_lists(self, folder: Path, settings: dict[str, Any] | None) -> InvertedLists | None:
        if settings is None:
            return None
        try:
            return InvertedLists(folder / FOLDER, self._vectors, settings["probes"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise damaged_index(folder, FOLDER) from error

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Return the `k` nearest documents of each query, or all of them if the index has fewer.

        Raises:
            EngineError: The encoder fails.
        """
        return [self.documents.result(*hits) for hits in self._search_rows(queries, k)]

    def search_ids(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """Return the ids and the scores that `search` finds, without reading the documents."""
        return [self.documents.ranking(*hits) for hits in self._search_rows(queries, k)]

    def _search_rows(self, queries: Sequence[Query], k: int) -> Hits:
        """Return the rows and the scores of the best documents of each query."""
        check_k(k)
        hits: Hits = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        nonempty = [i for i, query in enumerate(queries) if query.text.strip()]
        if nonempty:
            texts = [queries[i].text for i in nonempty]
            vectors = encode(self._encoder.encode_query, texts, self._prefix, self._normalizes)
            for i, neighbors in zip(nonempty, self._nearest(vectors, k), strict=True):
                hits[i] = neighbors
        return hits

    def _nearest(self, vectors: np.ndarray, k: int) -> Hits:
        if self._lists is None:
            return exact_neighbors(vectors, self._vectors, k)
        return self._lists.search(vectors, k)


def _check_fingerprint(folder: Path, model: str, fingerprint: str | None) -> None:
    """Raise OutdatedIndexError if the model's files have another fingerprint than when they were indexed."""
    if fingerprint is None:
        logger.warning(
            "the index %s does not say which weights of %s encoded its documents, since an older version of "
            "rlkit built it: if the model has been trained since then, rebuild the index with `rlkit index "
            "--overwrite`",
            folder,
            model,
        )
    elif model_fingerprint(model) != fingerprint:
        raise OutdatedIndexError(
            f"the files of the encoder {model} have changed since the index {folder} was built: rebuild it "
            "with `rlkit index --overwrite`"
        )
