"""When are trained document vectors (DynamicRetriever) better than the encoder's, and when are they worse?

The vectors are trained by the function behind `rlkit index --train_queries`, on judged training queries, on
sentences of the documents, on both, or on the queries of half of the documents. The controls are the
encoder's vectors, which are those before training, BM25, and the fusion of the same queries
(`rlkit index --augment`). A seed samples the training queries and the half, and orders the queries. The tests
are over documents, because the queries of a document resemble each other. The numbers of epochs and the
alphas below are the best ones on held-out training queries.

    python scripts/build_man_collection.py -o runs/pairs/man
    python benchmarks/document_vectors.py --collection data/metatool --epochs 30 --alpha 0.3
    python benchmarks/document_vectors.py --collection runs/pairs/man --epochs 10 --alpha 0.05
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from identify import sentence_rows
from retrieval import Scores, compare_pairs, mean_by_document, mean_of, save, score, summarize

from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import full_text
from rlkit.retrieval.encoders import encode, load_encoder
from rlkit.retrieval.engines.document_queries import DocumentQueries, fuse, train_vectors
from rlkit.retrieval.measures import Evaluator

RESULTS = Path(__file__).parent / "results" / "document_vectors.json"
ENCODER = "bundled:all-minilm-l6-v2"
NUM_QUERIES = 1000  # maximum number of training queries of a seed
MEASURES = ("rr@10", "recall@1", "recall@10")
DEPTH = 10
HALF = "queries of half of the documents"
SOURCES = ("queries", "sentences", "both", HALF)
PAIRS = [
    ("bm25", "encoder"),
    *[("encoder", f"{source}, {method}") for source in SOURCES for method in ("trained", "fused")],
    *[(f"{source}, fused", f"{source}, trained") for source in SOURCES],
    ("queries, trained", "both, trained"),
]


class Vectors(NamedTuple):
    """Embeddings of a collection: documents (D, dimensions) in order of `ids`, and a vector by query text."""

    ids: list[str]
    documents: np.ndarray
    queries: dict[str, np.ndarray]


def training_pairs(collection: Collection, source: str, seed: int) -> list[tuple[str, str]]:
    """Return the training pairs of a source: the text of a query, and the id of a document."""
    rng = random.Random(seed)
    judged = {
        query: {document for document, grade in grades.items() if grade > 0}
        for query, grades in sorted(collection.judged("train").items())
    }
    queries = rng.sample(list(judged), min(NUM_QUERIES, len(judged)))
    if source == HALF:
        ids = sorted(document.id for document in collection.documents())
        half = set(rng.sample(ids, len(ids) // 2))
        queries = [query for query in queries if judged[query] <= half]
    pairs = []
    if source != "sentences":
        pairs += [
            (collection.queries[query], document) for query in queries for document in sorted(judged[query])
        ]
    if source in ("sentences", "both"):
        rows = (row for document in collection.documents() for row in sentence_rows(document))
        pairs += [(row.query, row.document) for row in rows if row.document is not None]
    return list(dict.fromkeys(pairs))


def embed(collection: Collection, texts: Iterable[str]) -> Vectors:
    """Embed the documents of a collection, and queries."""
    encoder = load_encoder(ENCODER)
    documents, queries = list(collection.documents()), list(dict.fromkeys(texts))
    return Vectors(
        [document.id for document in documents],
        encode(encoder.encode_document, [full_text(document) for document in documents], None),
        dict(zip(queries, encode(encoder.encode_query, queries, None), strict=True)),
    )


def update(
    vectors: Vectors, pairs: Sequence[tuple[str, str]], *, seed: int, epochs: int, alpha: float
) -> dict[str, np.ndarray]:
    """Return the document vectors after training on pairs, and after their fusion."""
    row_of = {document: row for row, document in enumerate(vectors.ids)}
    pairs = sorted(pairs, key=lambda pair: (row_of[pair[1]], pair[0]))
    rows, texts = np.array([row_of[document] for _, document in pairs]), [query for query, _ in pairs]
    query_vectors = np.stack([vectors.queries[text] for text in texts])
    queries = DocumentQueries(rows, texts, 0, "")
    return {
        "trained": train_vectors(vectors.documents, query_vectors, queries, epochs=epochs, seed=seed)[0],
        "fused": fuse(vectors.documents, query_vectors, rows, alpha, True),
    }


def evaluate(collection: Collection, vectors: Vectors, documents: np.ndarray) -> Scores:
    """Return the value of each measure for each test query."""
    judged = collection.judged("test")
    evaluator = Evaluator(judged, MEASURES)
    scores = {}
    for query in judged:
        similarities = documents @ vectors.queries[collection.queries[query]]
        best = np.argsort(-similarities, kind="stable")[:DEPTH]
        scores[query] = evaluator(query, [vectors.ids[row] for row in best])
    return scores


def split_means(scores: Scores, collection: Collection, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the mean of the first measure over queries whose documents all have training queries, or none.

    Args:
        scores: Value of each measure for each test query.
        collection: Collection of the queries.
        pairs: Training pairs.
    """
    trained = {document for _, document in pairs}
    groups: dict[str, dict] = {"with queries": {}, "without queries": {}}
    for query, grades in collection.judged("test").items():
        relevant = {document for document, grade in grades.items() if grade > 0}
        if relevant <= trained:
            groups["with queries"][query] = scores[query]
        elif not relevant & trained:
            groups["without queries"][query] = scores[query]
    return {name: round(mean_of(group, MEASURES[0]), 4) for name, group in groups.items() if group}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", required=True, help="collection with the splits train and test")
    parser.add_argument("--epochs", type=int, required=True, help="number of epochs of the training")
    parser.add_argument("--alpha", type=float, required=True, help="weight of each query in the fusion")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    options = parser.parse_args()
    collection = load_collection(options.collection)
    pairs = {
        source: [training_pairs(collection, source, seed) for seed in options.seeds] for source in SOURCES
    }
    texts = [query for by_seed in pairs.values() for pairs_of_seed in by_seed for query, _ in pairs_of_seed]
    vectors = embed(collection, [*texts, *(collection.queries[query] for query in collection.judged("test"))])

    def by_document(scores: Scores) -> Scores:
        return mean_by_document(scores, options.collection)

    untrained = evaluate(collection, vectors, vectors.documents)
    systems: dict[str, list[Scores]] = {
        "bm25": [by_document(score("bm25", options.collection, MEASURES))],
        "encoder": [by_document(untrained)],
    }
    by_half: dict[str, list[dict[str, float]]] = {"encoder": [], "trained": [], "fused": []}
    for source, by_seed in pairs.items():
        for seed, pairs_of_seed in zip(options.seeds, by_seed, strict=True):
            scores = {
                method: evaluate(collection, vectors, documents)
                for method, documents in update(
                    vectors, pairs_of_seed, seed=seed, epochs=options.epochs, alpha=options.alpha
                ).items()
            }
            for method, of_method in scores.items():
                systems.setdefault(f"{source}, {method}", []).append(by_document(of_method))
            if source == HALF:
                for method, of_method in {"encoder": untrained, **scores}.items():
                    by_half[method].append(split_means(of_method, collection, pairs_of_seed))
    result = {
        "epochs": options.epochs,
        "alpha": options.alpha,
        "documents": len(vectors.ids),
        "documents_with_test_queries": len(systems["encoder"][0]),
        "training_pairs": {source: [len(one) for one in by_seed] for source, by_seed in pairs.items()},
        "means": summarize(systems, MEASURES),
        f"tests_of_{MEASURES[0]}": compare_pairs(systems, MEASURES[0], PAIRS),
        f"{MEASURES[0]}_by_half": by_half,
    }
    # The file holds the results of all collections.
    previous = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    save(previous | {Path(options.collection).name: result}, RESULTS)


if __name__ == "__main__":
    main()
