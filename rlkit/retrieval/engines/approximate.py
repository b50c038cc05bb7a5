"""Approximate nearest neighbors: an inverted file of 8-bit vectors, whose best candidates are ranked exactly.

k-means groups the vectors into lists. A query is compared only with the vectors of the lists whose centers
are nearest, which are quantized to 8 bits per dimension, and the best of them are ranked by their float32
vectors. Both files are memory-mapped, so that a process reads only what its queries need. How many lists a
search needs is measured when the index is built: the smallest number with which the search finds enough of
the exact neighbors of sampled queries.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rlkit.retrieval.store import Progress

if TYPE_CHECKING:
    import faiss

logger = logging.getLogger(__name__)

LISTS = "lists.faiss"
LISTS_PER_ROOT = 4  # lists per square root of the number of vectors
MIN_LIST_SIZE, SAMPLE_PER_LIST = 39, 50  # vectors; FAISS warns about k-means with fewer per center
ITERATIONS = 10  # of k-means
BLOCK = 50_000  # vectors added at once
# Depths for which the number of lists is measured. Deep rankings need more lists.
DEPTHS = (10, 100, 1000)
CANDIDATES_PER_RESULT, MIN_CANDIDATES = 2, 50  # ranked exactly
NUM_STANDARD_ERRORS = 3  # by which the measured recall exceeds the target
SCORE_TOLERANCE = 1e-6  # relative difference of scores that are equal up to rounding

Hits = list[tuple[np.ndarray, np.ndarray]]  # rows and inner products of the neighbors of each query


def build_lists(
    folder: Path, vectors: np.ndarray, queries: np.ndarray, target_recall: float, progress: Progress
) -> dict[str, Any]:
    """Write the inverted file of vectors and return its settings.

    Args:
        folder: Folder to write `lists.faiss` to.
        vectors: Vectors to index, float32 (vectors, dimensions), usually memory-mapped.
        queries: Vectors of queries with which the recall is measured, float32 (queries, dimensions). They
            should be distributed like those of later searches, and not be among the vectors.
        target_recall: Share of the exact neighbors that a search shall find.
        progress: Progress bar.

    Returns:
        `lists`, the number of lists; `probes`, the number of them that are searched, by depth of the ranking;
        `recall`, the measured recall by depth; and `target_recall`.
    """
    import faiss

    index = _train(vectors)
    blocks = range(0, len(vectors), BLOCK)
    for start in progress(blocks, "lists", len(blocks)):
        index.add(np.ascontiguousarray(vectors[start : start + BLOCK]))
    faiss.write_index(index, str(folder / LISTS))
    del index  # the file is mapped instead
    lists = InvertedLists(folder, vectors, {})
    probes: dict[str, int] = {}
    recall: dict[str, float] = {}
    depths = [depth for depth in DEPTHS if depth < len(vectors)] or [len(vectors)]
    exact = exact_neighbors(queries, vectors, depths[-1])
    for depth in depths:
        probes[str(depth)], measured = _measure_probes(lists, queries, exact, depth, target_recall)
        recall[str(depth)] = round(measured, 4)
        if measured < target_recall:
            logger.warning(
                "the approximate index finds %.1f%% of the %d nearest documents, less than %.1f%%: search an "
                "index without --approximate if that is not enough",
                100 * measured,
                depth,
                100 * target_recall,
            )
    return {"lists": lists.num_lists, "probes": probes, "recall": recall, "target_recall": target_recall}


class InvertedLists:
    """Searches the inverted file that `build_lists` wrote. Several threads may search at the same time.

    Args:
        folder: Folder of `lists.faiss`.
        vectors: The indexed vectors, float32 (vectors, dimensions).
        probes: Number of lists to search, by depth of the ranking; without it, only one is searched.

    Raises:
        RuntimeError: The file is missing or damaged (FAISS).
        ValueError: The file has other vectors.
    """

    def __init__(self, folder: Path, vectors: np.ndarray, probes: dict[str, int]):
        import faiss

        # FAISS's type stubs do not describe inverted files.
        self._index = cast("Any", faiss.read_index(str(folder / LISTS), faiss.IO_FLAG_MMAP))
        if (self._index.ntotal, self._index.d) != vectors.shape:
            raise ValueError("the inverted file has other vectors")
        # For each search, FAISS would start 32 threads that read the lists ahead.
        cast("Any", faiss.downcast_InvertedLists(self._index.invlists)).prefetch_nthread = 0
        self._vectors = np.asarray(vectors)  # indexing a memmap is slow
        self._probes = sorted((int(depth), number) for depth, number in probes.items())
        self.num_lists: int = self._index.nlist

    def search(self, queries: np.ndarray, k: int) -> Hits:
        """Return the rows and the inner products of `k` near vectors of each query, best first."""
        return self.search_lists(queries, k, self._num_probes(k))

    def search_lists(self, queries: np.ndarray, k: int, num_probes: int) -> Hits:
        """Search the nearest `num_probes` lists of each query, or more if they have too few vectors."""
        import faiss

        k = min(k, len(self._vectors))
        num_candidates = min(max(CANDIDATES_PER_RESULT * k, MIN_CANDIDATES), len(self._vectors))
        parameters = faiss.SearchParametersIVF(nprobe=num_probes)  # type: ignore[call-arg]
        _, all_rows = self._index.search(queries, num_candidates, params=parameters)
        hits = []
        for query, candidates in zip(queries, all_rows, strict=True):
            rows = candidates[candidates >= 0]  # FAISS fills up with row -1
            if len(rows) < k and num_probes < self.num_lists:
                hits += self.search_lists(query[None], k, min(2 * num_probes, self.num_lists))
                continue
            scores = self._vectors[rows] @ query
            order = np.lexsort((rows, -scores))[:k]  # ties in the order of the rows
            hits.append((rows[order], scores[order]))
        return hits

    def _num_probes(self, k: int) -> int:
        for depth, number in self._probes:
            if k <= depth:
                return number
        # Deeper than measured: as many more lists as documents.
        depth, number = self._probes[-1] if self._probes else (k, 1)
        return min(math.ceil(number * k / depth), self.num_lists)


def exact_neighbors(queries: np.ndarray, vectors: np.ndarray, k: int) -> Hits:
    """Return the rows and the inner products of the `k` nearest vectors of each query, best first.

    Args:
        queries: Vectors of the queries, float32 (queries, dimensions).
        vectors: Vectors to search, float32 (vectors, dimensions).
        k: Maximum number of rows per query.
    """
    import faiss

    all_scores, all_rows = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    hits = []
    for scores, rows in zip(all_scores, all_rows, strict=True):
        # FAISS orders ties arbitrarily, and fills up with row -1 if there are fewer than k vectors.
        order = np.lexsort((rows, -scores))
        order = order[rows[order] >= 0]
        hits.append((rows[order], scores[order]))
    return hits


def recalls(hits: Hits, exact: Hits, k: int) -> np.ndarray:
    """Return the share of the `k` exact neighbors that each query finds. Equal scores count as the same."""
    shares = []
    for (_, scores), (_, exact_scores) in zip(hits, exact, strict=True):
        lowest = exact_scores[:k][-1]
        lowest -= SCORE_TOLERANCE * max(abs(exact_scores[0]), abs(lowest))
        shares.append(np.count_nonzero(scores[:k] >= lowest) / min(k, len(exact_scores)))
    return np.array(shares)


def _train(vectors: np.ndarray) -> faiss.IndexIVFScalarQuantizer:
    """Return an empty inverted file, with the centers of a sample of the vectors."""
    import faiss

    num_vectors, dimensions = vectors.shape
    num_lists = round(LISTS_PER_ROOT * math.sqrt(num_vectors))
    num_lists = max(1, min(num_lists, num_vectors // MIN_LIST_SIZE))
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dimensions),
        dimensions,
        num_lists,
        faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
    )
    index.cp.niter, index.cp.min_points_per_centroid, index.cp.seed = ITERATIONS, 1, 0
    sample_size = min(num_vectors, max(SAMPLE_PER_LIST * num_lists, 10_000))
    rows = np.sort(np.random.default_rng(0).permutation(num_vectors)[:sample_size])
    index.train(np.ascontiguousarray(vectors[rows]))
    return index


def _measure_probes(
    lists: InvertedLists, queries: np.ndarray, exact: Hits, k: int, target_recall: float
) -> tuple[int, float]:
    """Return the smallest number of lists with which the recall reaches the target, and that recall."""

    def measure(num_probes: int) -> tuple[float, bool]:
        shares = recalls(lists.search_lists(queries, k, num_probes), exact, k)
        # The mean of a sample may be too high, and the smallest number that reaches the target is selected.
        standard_error = shares.std() / math.sqrt(len(shares))
        lower_bound = shares.mean() - NUM_STANDARD_ERRORS * standard_error
        return float(shares.mean()), bool(lower_bound >= target_recall)

    low, high = 0, 1
    recall, is_enough = measure(high)
    while not is_enough and high < lists.num_lists:
        low, high = high, min(2 * high, lists.num_lists)
        recall, is_enough = measure(high)
    while high - low > 1:
        middle = (low + high) // 2
        middle_recall, is_enough = measure(middle)
        if is_enough:
            high, recall = middle, middle_recall
        else:
            low = middle
    return high, recall
