"""Cost of a ranking reward: rlkit's reused evaluator compared with ir-measures, reused and from scratch.

The script computes nDCG@10 for 1,000 queries with 100 ranked documents each, with one call per query, as
rewards are called.

    python benchmarks/retrieval_metrics.py
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import ir_measures

from rlkit.retrieval.measures import Evaluator, descending_scores

RESULT = Path(__file__).parent / "results" / "retrieval_metrics.json"
QUERIES, DOCUMENTS, REPEATS = 1000, 100, 5


def microseconds(call: Callable[[str], object], queries: list[str]) -> float:
    """Return the microseconds of one call, as the minimum over the repeats."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for query in queries:
            call(query)
        times.append((time.perf_counter() - start) / len(queries) * 1e6)
    return min(times)


def main() -> None:
    """Measure and write the result."""
    rng = random.Random(0)
    document_ids = [f"d{i}" for i in range(500)]
    queries = [f"q{i}" for i in range(QUERIES)]
    qrels = {}
    for query in queries:
        qrels[query] = {document: rng.randrange(1, 4) for document in rng.sample(document_ids, 10)}
    rankings = {query: rng.sample(document_ids, DOCUMENTS) for query in queries}
    runs = {query: descending_scores(ranking) for query, ranking in rankings.items()}
    ours = Evaluator(qrels, ["ndcg@10"])
    measure = ir_measures.nDCG @ 10
    theirs = ir_measures.evaluator([measure], qrels)
    for query in queries[:50]:  # both must agree before their speed means anything
        (expected,) = ir_measures.iter_calc([measure], {query: qrels[query]}, {query: runs[query]})
        assert abs(ours(query, rankings[query])["ndcg@10"] - expected.value) < 1e-9
    times = {
        "ours": microseconds(lambda query: ours(query, rankings[query]), queries),
        "ir_measures, its evaluator reused": microseconds(
            lambda query: list(theirs.iter_calc({query: runs[query]})), queries[:100]
        ),
        "ir_measures, from scratch": microseconds(
            lambda query: ir_measures.calc_aggregate([measure], {query: qrels[query]}, {query: runs[query]}),
            queries[:100],
        ),
    }
    result = {
        "microseconds a query": {name: round(value, 1) for name, value in times.items()},
        "from scratch to ours": round(times["ir_measures, from scratch"] / times["ours"], 1),
        "documents in a ranking": DOCUMENTS,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
