"""Does the round-trip filter pay, with which K, and does a filter by learning value add to it?

The candidates are rows with known faults: a third has real pairs of a training query and its document, a
third has real queries with a wrong document, and a third has documents as queries for themselves. The filters
see none of this. Each set of rows trains the same residual of the query vector (`adapter_rank` of
`rlkit rank`) with InfoNCE, and is tested on all test queries. The negatives of a row are all other documents.
The retriever of the round trip is the untrained encoder. The learning value of a row is its mean over a few
real pairs (`rlkit/retrieval/learning_value.py`), which are not among the candidates; they are also trained on
alone. The bound has the real pairs of the candidates. The settings are not tuned. The tests are paired over
the documents, because queries for one document resemble each other.

    python benchmarks/round_trip.py --collection data/metatool
"""

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev

import numpy as np
import torch
from residuals import ENCODER, ResidualTraining
from retrieval import Scores, compare_pairs, mean_by_document, mean_of, save, summarize

from rlkit.envs.ranking.pairs.filters import source_ranks
from rlkit.envs.ranking.pairs.rows import PairRow
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import SearchEngine, passage_text
from rlkit.retrieval.learning_value import learning_values
from rlkit.retrieval.retrievers import open_retriever
from rlkit.training.ranking.losses import infonce
from rlkit.training.ranking.scorers import AdapterScorer

RESULTS = Path(__file__).parent / "results" / "round_trip.json"
MEASURES = ("ndcg@5", "recall@5")
NUM_DEV = 16  # real pairs that the learning value is computed with
NUM_PAIRS = 366  # of a seed; half of them stay real pairs
TOP = 10
STEPS, BATCH_SIZE, LEARNING_RATE, TEMPERATURE = 300, 64, 1e-3, 0.05
NONE, ALL, TOP_1, TOP_10 = "no training", "all candidates", "round trip, top 1", "round trip, top 10"
BOTH, REAL = "top 10 and learning value > 0", "real pairs"
PAIRS = [(NONE, ALL), (NONE, TOP_10), (ALL, TOP_10), (TOP_1, TOP_10), (TOP_10, BOTH), (TOP_10, REAL)]


def real_pairs(collection: Collection) -> list[tuple[str, str]]:
    """Return the training queries with exactly one relevant document, as pairs of text and document id."""
    pairs = []
    for query, grades in sorted(collection.judged("train").items()):
        relevant = [document for document, grade in grades.items() if grade > 0]
        if len(relevant) == 1:
            pairs.append((collection.queries[query], relevant[0]))
    return pairs


def candidate_rows(
    pairs: Sequence[tuple[str, str]], texts: Mapping[str, str], rng: random.Random
) -> list[PairRow]:
    """Return rows of three sources: half of the pairs, the other half with wrong documents, and copies.

    Args:
        pairs: Pairs of a query and the id of its document, in random order.
        texts: Text of each document.
        rng: Random number generator of the documents.
    """
    names = list(texts)
    num_real = len(pairs) // 2
    rows = [("real", query, name) for query, name in pairs[:num_real]]
    for query, name in pairs[num_real:]:
        rows.append(("wrong", query, rng.choice([other for other in names if other != name])))
    rows += [("copy", texts[name], name) for name in rng.choices(names, k=num_real)]
    return [
        PairRow(f"{source}/{i}", query, (texts[name],), (1.0,), source, name)
        for i, (source, query, name) in enumerate(rows)
    ]


def train(
    training: ResidualTraining, rows: Sequence[PairRow], texts: Mapping[str, str], *, seed: int, steps: int
) -> AdapterScorer:
    """Return a scorer that is trained on rows with InfoNCE, with all other documents as negatives.

    `RankingTrainer` has the documents of a batch as negatives, which would differ between the sets of rows.

    Args:
        training: Encoder, with its cache of vectors.
        rows: Training rows.
        texts: Text of each document of the collection.
        seed: Seed of the residual and of the order of rows.
        steps: Number of optimizer steps, each with a batch drawn with replacement.
    """
    scorer = training.scorer(seed, TEMPERATURE)
    optimizer = torch.optim.Adam(scorer.residuals.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    names, documents = list(texts), list(texts.values())
    targets = torch.tensor([names.index(row.document) for row in rows])
    for _ in range(steps):
        batch = torch.randint(len(rows), (BATCH_SIZE,), generator=generator)
        scores = scorer([rows[i].query for i in batch.tolist()], [], documents)
        loss = infonce(scores, targets[batch], torch.ones_like(scores, dtype=torch.bool)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scorer


def mean_learning_values(
    training: ResidualTraining, rows: Sequence[PairRow], dev_rows: Sequence[PairRow], texts: Mapping[str, str]
) -> np.ndarray:
    """Return the mean learning value of each row over the dev rows, (rows,)."""
    scorer = training.scorer(temperature=TEMPERATURE)
    position = {name: i for i, name in enumerate(texts)}
    queries, dev_queries = (
        scorer.embed([row.query for row in of_set], "query").detach().numpy() for of_set in (rows, dev_rows)
    )
    targets, dev_targets = (
        np.array([position[row.document] for row in of_set]) for of_set in (rows, dev_rows)
    )
    documents = scorer.embed(list(texts.values()), "document").detach().numpy()
    return learning_values(
        queries, targets, documents, dev_queries, dev_targets, temperature=TEMPERATURE
    ).mean(1)


def row_sets(
    collection: Collection, engine: SearchEngine, training: ResidualTraining, seed: int
) -> dict[str, list[PairRow]]:
    """Return the sets of training rows of one seed."""
    rng = random.Random(seed)
    texts = {document.id: passage_text(document) for document in collection.documents()}
    pairs = real_pairs(collection)
    pairs = rng.sample(pairs, min(NUM_DEV + NUM_PAIRS, len(pairs)))
    dev_rows = [
        PairRow(f"dev/{i}", query, (texts[name],), (1.0,), "dev", name)
        for i, (query, name) in enumerate(pairs[:NUM_DEV])
    ]
    rows = candidate_rows(pairs[NUM_DEV:], texts, rng)
    ranks = source_ranks(rows, collection, engine, TOP)
    values = mean_learning_values(training, rows, dev_rows, texts)
    candidates = list(zip(rows, ranks, values, strict=True))
    return {
        f"the {NUM_DEV} dev pairs": dev_rows,
        ALL: rows,
        TOP_1: [row for row, rank, _ in candidates if rank == 1],
        TOP_10: [row for row, rank, _ in candidates if rank],
        "round trip, ranks 2-10": [row for row, rank, _ in candidates if rank and rank > 1],
        "learning value > 0": [row for row, _, value in candidates if value > 0],
        BOTH: [row for row, rank, value in candidates if rank and value > 0],
        REAL: [row for row in rows if row.source == "real"],
    }


def deviations(systems: Mapping[str, Sequence[Scores]]) -> dict[str, dict[str, float]]:
    """Return the standard deviation over the seeds of each measure for each system with several seeds."""
    return {
        name: {
            measure: round(stdev(mean_of(scores, measure) for scores in by_seed), 4) for measure in MEASURES
        }
        for name, by_seed in systems.items()
        if len(by_seed) > 1
    }


def mean_numbers(rows_of_seeds: Sequence[Sequence[PairRow]]) -> dict[str, float]:
    """Return the mean number of rows of each source over the seeds."""
    numbers = Counter(row.source for rows in rows_of_seeds for row in rows)
    return {source: number / len(rows_of_seeds) for source, number in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--collection",
        default="data/metatool",
        help="collection with training queries (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)), help="default: 0 to 7")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    options = parser.parse_args()
    collection = load_collection(options.collection)
    texts = {document.id: passage_text(document) for document in collection.documents()}
    engine, training = open_retriever(f"dense:{ENCODER}", collection), ResidualTraining()
    untrained = training.score(training.scorer(), options.collection, MEASURES)
    systems: dict[str, list[Scores]] = {NONE: [untrained]}
    sets: dict[str, list[list[PairRow]]] = {}
    for seed in options.seeds:
        for name, rows in row_sets(collection, engine, training, seed).items():
            scorer = train(training, rows, texts, seed=seed, steps=options.steps)
            systems.setdefault(name, []).append(training.score(scorer, options.collection, MEASURES))
            sets.setdefault(name, []).append(rows)
            print(
                f"seed {seed}, {name}: {len(rows)} rows, {mean_of(systems[name][-1], MEASURES[0]):.3f}",
                flush=True,
            )
    # Queries for one document resemble each other.
    by_document = {
        name: [mean_by_document(scores, options.collection) for scores in by_seed]
        for name, by_seed in systems.items()
    }
    result = {
        "collection": Path(options.collection).name,
        "test_queries": len(untrained),
        "documents_with_test_queries": len(by_document[NONE][0]),
        "steps": options.steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "temperature": TEMPERATURE,
        "seeds": options.seeds,
        "means": summarize(systems, MEASURES),
        "means_over_documents": summarize(by_document, MEASURES),
        "sd_over_seeds": deviations(systems),
        "mean_numbers_of_rows": {name: mean_numbers(rows_of_seeds) for name, rows_of_seeds in sets.items()},
        **{f"tests_of_{measure}": compare_pairs(by_document, measure, PAIRS) for measure in MEASURES},
    }
    save(result, RESULTS)


if __name__ == "__main__":
    main()
