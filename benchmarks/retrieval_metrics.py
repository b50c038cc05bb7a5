"""What a ranking reward costs: our reused evaluator against ir-measures, reused and from scratch.

1,000 queries with 100 ranked documents each, nDCG@10, one call a query, as a reward is called.

    python benchmarks/retrieval_metrics.py
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import ir_measures

from rlkit.retrieval.measures import Evaluator, write_run

RESULT = Path(__file__).parent / "results" / "retrieval_metrics.json"
QUERIES, DOCUMENTS, REPEATS = 1000, 100, 5


def microseconds(call: Callable[[str], object], queries: list[str]) -> float:
    """Of one call, the least of some repeats."""
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for query in queries:
            call(query)
        found.append((time.perf_counter() - start) / len(queries) * 1e6)
    return min(found)


def main() -> None:
    """Measure and write."""
    drawn = random.Random(0)
    names = [f"d{i}" for i in range(500)]
    queries = [f"q{i}" for i in range(QUERIES)]
    qrels = {query: {name: drawn.randrange(1, 4) for name in drawn.sample(names, 10)} for query in queries}
    rankings = {query: drawn.sample(names, DOCUMENTS) for query in queries}
    runs = {query: write_run(ranking) for query, ranking in rankings.items()}
    ours = Evaluator(qrels, ["ndcg@10"])
    measure = ir_measures.nDCG @ 10
    theirs = ir_measures.evaluator([measure], qrels)
    for query in queries[:50]:
        (other,) = ir_measures.iter_calc([measure], {query: qrels[query]}, {query: runs[query]})
        assert abs(ours(query, rankings[query])["ndcg@10"] - other.value) < 1e-9
    made = {
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
        "microseconds a query": {name: round(value, 1) for name, value in made.items()},
        "from scratch to ours": round(made["ir_measures, from scratch"] / made["ours"], 1),
        "documents in a ranking": DOCUMENTS,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
