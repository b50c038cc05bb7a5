"""What do queries that are copied from a document earn in write-v1, beside the queries of people?

A program makes queries from the documents of training tasks in six ways. Their mean rewards are compared with
those of the queries that people have asked for these documents, and of their queries for other documents.

    python benchmarks/query_copies.py --collection data/metatool
"""

import argparse
import random
from pathlib import Path
from statistics import fmean

from retrieval import save

from rlkit.check.play import play
from rlkit.envs.ranking.query_statistics import QueryStatistics
from rlkit.registry import load_environment
from rlkit.reward import call_reward
from rlkit.words import words

RESULTS = Path(__file__).parent / "results" / "query_copies.json"
ENCODER = "bundled:all-minilm-l6-v2"
PERSON, OTHER_DOCUMENT = "of a person", "of a person, for another document"


def copies(document: str, statistics: QueryStatistics, rng: random.Random) -> dict[str, str]:
    """Return queries that are made from a document, by how they are made."""
    tokens = document.split()
    specific = sorted({w for w in words(document) if w not in statistics.frequent_words and len(w) > 2})
    start = rng.randrange(max(1, len(tokens) - 8))
    rarest = sorted(set(words(document)), key=lambda word: (statistics.document_counts[word], word))
    sample = rng.sample(specific, min(5, len(specific)))
    return {
        "first 8 words": " ".join(tokens[:8]),
        "8 words in a row": " ".join(tokens[start : start + 8]),
        "5 rarest words": " ".join(rarest[:5]),
        "3 random words": " ".join(sample[:3]),
        "5 random words": " ".join(sample),
        "5 random words in a frame": f"which {' and the '.join(sample)}",
    }


def mean_rewards(
    collection: str, retriever: str, encoder: str | None, num_tasks: int
) -> dict[str, dict[str, float]]:
    """Return the mean of each reward for each kind of query.

    Args:
        collection: Collection with training queries.
        retriever: Retriever of the round trip.
        encoder: Encoder of the learning value; None for no learning value.
        num_tasks: Number of training tasks.
    """
    environment = load_environment("write-v1", collection=collection, retriever=retriever, encoder=encoder)
    tasks, rng = list(environment.tasks("train", num_tasks)), random.Random(0)
    of_people = [task["query"] for task in tasks]
    queries = {PERSON: of_people, OTHER_DOCUMENT: of_people[1:] + of_people[:1]}
    for task in tasks:
        document = environment.document_texts[task["document_id"]]
        for kind, query in copies(document, environment.query_statistics, rng).items():
            queries.setdefault(kind, []).append(query)
    names = [name for name in environment.rewards if encoder is not None or name != "learning_value"]
    means = {}
    for kind, texts in queries.items():
        rows = play(environment, tasks, [[text] for text in texts])
        means[kind] = {
            name: round(fmean(call_reward(environment.rewards[name], row) for row in rows), 4)
            for name in names
        }
    return means


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", default="data/metatool", help="default: data/metatool")
    parser.add_argument("--tasks", type=int, default=200, help="number of training tasks (default: 200)")
    options = parser.parse_args()
    result = {
        retriever: mean_rewards(options.collection, retriever, ENCODER, options.tasks)
        for retriever in (f"dense:{ENCODER}", "bm25")
    }
    save(result, RESULTS)


if __name__ == "__main__":
    main()
