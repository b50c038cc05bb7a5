"""What do trained vectors of documents gain over an encoder's (DynamicRetriever), and what do they lose?

The vectors of all documents are trained by the function behind `rlkit index --fit_queries`: on judged
training queries, on sentences of the documents, on both, or on the queries of one half of the documents. The
controls are the encoder's own vectors, which are those before training, BM25, and the fusion of the same
queries (`rlkit index --augment`). A seed samples the training queries and the half, and orders the batches.
The tests are over documents, whose queries resemble each other.

    python scripts/build_man_collection.py -o runs/pairs/man
    python benchmarks/document_vectors.py --collection data/metatool
    python benchmarks/document_vectors.py --collection runs/pairs/man
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
from rlkit.retrieval.engines.document_queries import DocumentQueries, fit, fuse
from rlkit.retrieval.measures import Evaluator

RESULTS = Path(__file__).parent / "results" / "document_vectors.json"
ENCODER = "bundled:all-minilm-l6-v2"
ALPHA = 0.1  # of the fusion
NUM_QUERIES = 1000  # maximum number of training queries of a seed
MEASURES = ("rr@10", "recall@1", "recall@10")
SOURCES = ("queries", "sentences", "both", "queries of half of the documents")
PAIRS = [
    ("bm25", "encoder"),
    *[("encoder", f"{source}, trained") for source in SOURCES],
    *[(f"{source}, fused", f"{source}, trained") for source in SOURCES],
    ("queries, trained", "both, trained"),
]


class Vectors(NamedTuple):
    """Embeddings of a collection: documents (D, dimensions) in order of `ids`, and a vector by query text."""

    ids: list[str]
    documents: np.ndarray
    queries: dict[str, np.ndarray]


def pairs_of(collection: Collection, source: str, seed: int) -> list[tuple[str, str]]:
    """Return the training pairs of a source: the text of a query, and the id of a document."""
    ids = sorted(document.id for document in collection.documents())
    judged = sorted(collection.judged("train").items())
    queries = random.Random(seed).sample(judged, min(NUM_QUERIES, len(judged)))
    known = set(ids if source != SOURCES[-1] else random.Random(seed).sample(ids, len(ids) // 2))
    pairs = []
    if source != "sentences":
        pairs += [
            (collection.queries[query], document)
            for query, grades in queries
            for document, grade in grades.items()
            if grade > 0 and document in known
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


def change(vectors: Vectors, pairs: Sequence[tuple[str, str]], seed: int) -> dict[str, np.ndarray]:
    """Return the documents' vectors after training on pairs, and after their fusion."""
    row_of = {document: row for row, document in enumerate(vectors.ids)}
    pairs = sorted(pairs, key=lambda pair: (row_of[pair[1]], pair[0]))
    rows, queries = np.array([row_of[document] for _, document in pairs]), [query for query, _ in pairs]
    written = DocumentQueries(rows, queries, 0, "")
    embedded = np.stack([vectors.queries[query] for query in queries])
    return {
        "trained": fit(vectors.documents, embedded, written, True, seed=seed),
        "fused": fuse(vectors.documents, embedded, rows, ALPHA, True),
    }


def evaluate(name: str, vectors: Vectors, documents: np.ndarray) -> Scores:
    """Return the mean of each measure over the test queries of each document."""
    collection = load_collection(name)
    judged = collection.judged("test")
    evaluator = Evaluator(judged, MEASURES)
    depth = 10  # of all measures
    scores = {}
    for query in judged:
        best = np.argsort(-(documents @ vectors.queries[collection.queries[query]]), kind="stable")[:depth]
        scores[query] = evaluator(query, [vectors.ids[row] for row in best])
    return mean_by_document(scores, name)


def split_means(scores: Scores, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the mean of the first measure over documents with and without training queries."""
    known = {document for _, document in pairs}
    groups = {
        "with queries": {name: values for name, values in scores.items() if name in known},
        "without": {name: values for name, values in scores.items() if name not in known},
    }
    return {group: round(mean_of(of_group, MEASURES[0]), 4) for group, of_group in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", required=True, help="collection with the splits train and test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    options = parser.parse_args()
    name = options.collection
    collection = load_collection(name)
    pairs = {source: [pairs_of(collection, source, seed) for seed in options.seeds] for source in SOURCES}
    written = [query for of_source in pairs.values() for of_seed in of_source for query, _ in of_seed]
    vectors = embed(collection, [*written, *(collection.queries[q] for q in collection.judged("test"))])
    systems: dict[str, list[Scores]] = {
        "bm25": [mean_by_document(score("bm25", name, MEASURES), name)],
        "encoder": [evaluate(name, vectors, vectors.documents)],
    }
    halves: dict[str, list[dict[str, float]]] = {"encoder": [], "trained": [], "fused": []}
    for source, of_source in pairs.items():
        for seed, of_seed in zip(options.seeds, of_source, strict=True):
            scores = {
                kind: evaluate(name, vectors, documents)
                for kind, documents in change(vectors, of_seed, seed).items()
            }
            for kind, of_kind in scores.items():
                systems.setdefault(f"{source}, {kind}", []).append(of_kind)
            if source == SOURCES[-1]:
                for kind, of_kind in {"encoder": systems["encoder"][0], **scores}.items():
                    halves[kind].append(split_means(of_kind, of_seed))
    result = {
        "documents": len(vectors.ids),
        "documents_with_test_queries": len(systems["encoder"][0]),
        "training_pairs": {source: [len(of_seed) for of_seed in of] for source, of in pairs.items()},
        "means": summarize(systems, MEASURES),
        f"tests_of_{MEASURES[0]}": compare_pairs(systems, MEASURES[0], PAIRS),
        f"{MEASURES[0]}_by_half": halves,
    }
    previous = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    save(previous | {Path(name).name: result}, RESULTS)


if __name__ == "__main__":
    main()
