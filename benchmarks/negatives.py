"""Which hard negatives train a better retriever: from BM25, from a cross-encoder, or written by a model?

"Don't Retrieve, Generate" (arXiv 2504.21015, third version) finds that written negatives consistently train
worse retrievers. Here, the judged training queries of man pages train a residual on a frozen MiniLM. All
sources have the same rows, and one negative per row, whose document is fixed; a seed changes the residual and
the order of the rows. There are two ways to train:

- "infonce": the negatives are the passages of the batch and the hard one. The baseline "none" has only those
  of the batch; "random" adds a random document.
- "ranknet": the hard negative is the only one, so that those of the batch cannot hide its effect. The
  baseline is a random document.

The number of steps and the learning rate are chosen once for each way, for all sources alike, by the mean
nDCG@10 on a fifth of the training queries. The cross-encoder is trained on the same training queries, and
reranks the first 100 documents of BM25. SmolLM2 writes from the query alone.

    python scripts/build_man_collection.py -o runs/pairs/man
    python benchmarks/negatives.py --backend vllm
"""

import itertools
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import retrieval
import seeds
from residuals import ResidualTraining

from rlkit.envs.ranking.pairs.negatives import add_negatives, known_answers, positive_passage, style_accuracy
from rlkit.envs.ranking.pairs.rows import PairRow, read_rows, write_rows
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import passage_text

RESULTS = Path(__file__).parent / "results" / "negatives.json"
MEASURES = ["ndcg@10", "precision@10", "recall@100"]
NONE, RANDOM, BM25, CROSS_ENCODER, WRITTEN = "none", "random", "bm25", "cross_encoder", "written"
HARD = (BM25, CROSS_ENCODER, WRITTEN)
# Sources that each objective is trained with; the first one is the baseline.
SOURCES = {"infonce": (NONE, RANDOM, *HARD), "ranknet": (RANDOM, *HARD)}
PAIRS = [
    ("untrained", f"infonce {NONE}"),
    *[("untrained", f"ranknet {source}") for source in SOURCES["ranknet"]],
    *[
        (f"{objective} {baseline}", f"{objective} {source}")
        for objective, (baseline, *_) in SOURCES.items()
        for source in HARD
    ],
    *[
        (f"{objective} {first}", f"{objective} {second}")
        for objective in SOURCES
        for first, second in itertools.combinations(HARD, 2)
    ],
]
SETTINGS = [{"steps": steps, "learning_rate": rate} for steps in (25, 50, 150) for rate in (1e-4, 3e-4, 1e-3)]
HELD_OUT = 0.2  # share of the training queries on which the settings are chosen
NUM_RERANKED = 200  # test queries on which the cross-encoder itself is measured

Rows = Mapping[str, Sequence[PairRow]]  # by source, in the same order


def train_cross_encoder(collection: str, folder: Path) -> Path:
    """Train the cross-encoder on the training queries, unless its model exists, and return the model."""
    run = folder / "cross_encoder"
    if not (run / "model").exists():
        environment_args = {"collection": collection, "retriever": "bm25", "candidates": 16}
        config = seeds.CONFIGS / "ranking" / "cross_encoder.yaml"
        seeds.launch("rank", config, 0, run, "--environment_args", json.dumps(environment_args))
    return run / "model"


def rows_by_source(collection: str, num_rows: int, model: Path, backend: str, folder: Path) -> Rows:
    """Return the same rows with the negative of each source; completed files are not written again."""
    judged, sample = folder / "judged.jsonl", folder / f"sample-{num_rows}.jsonl"
    if not judged.exists():
        seeds.script("make_pairs", collection, "--source", "judged", "-o", str(judged))
    if not sample.exists():
        rows = read_rows(judged)
        write_rows(sample, random.Random(0).sample(rows, min(num_rows, len(rows))))
    options = {
        BM25: ["--by", "bm25"],
        CROSS_ENCODER: ["--by", f"rerank:bm25|{model}@100"],
        WRITTEN: [
            *("--by", "written", "--model", "bundled:smollm2-135m"),
            *("--backend", backend, "--max_tokens", "60"),
        ],
    }
    lists: dict[str, dict[str, PairRow]] = {}
    for source, arguments in options.items():
        out = folder / f"{source}-{num_rows}.jsonl"
        if not out.exists():
            seeds.script("mine_negatives", collection, str(sample), *arguments, "-o", str(out))
        lists[source] = {row.id: row for row in read_rows(out)}
    pairs = [row for row in read_rows(sample) if all(row.id in of_source for of_source in lists.values())]
    return {
        NONE: pairs,
        RANDOM: with_random_negatives(pairs, collection),
        **{source: [of_source[row.id] for row in pairs] for source, of_source in lists.items()},
    }


def with_random_negatives(rows: Sequence[PairRow], collection: str) -> list[PairRow]:
    """Return rows with a random document of the collection that does not answer the query."""
    documents = list(load_collection(collection).documents())
    answers, generator = known_answers(rows), random.Random(0)
    lists = []
    for row in rows:
        document = generator.choice([d for d in documents if d.id not in answers[row.query]])
        lists.append(add_negatives(row, [(document.id, passage_text(document))]))
    return lists


def choose_settings(
    training: ResidualTraining, rows: Rows, objective: str, collection: str
) -> tuple[dict, dict[str, float]]:
    """Return the best settings of an objective for all sources alike, and the mean nDCG@10 of each."""
    queries = sorted({row.query for row in rows[NONE]})
    held_out = set(random.Random(0).sample(queries, max(1, round(HELD_OUT * len(queries)))))
    texts = load_collection(collection).queries
    means: dict[str, float] = {}
    for settings in SETTINGS:
        values = []
        for source in SOURCES[objective]:
            train_rows = [row for row in rows[source] if row.query not in held_out]
            scorer = training.train(train_rows, seed=0, objective=objective, **settings)
            scores = training.score(scorer, collection, ["ndcg@10"], "train")
            values += [value["ndcg@10"] for query, value in scores.items() if texts[query] in held_out]
        means[f"{settings['steps']} steps, {settings['learning_rate']:g}"] = round(float(np.mean(values)), 4)
    return SETTINGS[int(np.argmax(list(means.values())))], means


def run_systems(
    training: ResidualTraining, rows: Rows, settings: Mapping[str, dict], collection: str, seed: int
) -> dict[str, retrieval.Scores]:
    """Train all systems with one seed and return their scores of the test queries."""
    systems = {}
    for objective, sources in SOURCES.items():
        for source in sources:
            scorer = training.train(rows[source], seed=seed, objective=objective, **settings[objective])
            systems[f"{objective} {source}"] = training.score(scorer, collection, MEASURES)
    return systems


def style_of(rows: Rows) -> dict[str, dict[str, float]]:
    """Return the accuracies of classifiers that tell positives from the negatives of each source."""
    styles = {}
    for source in (RANDOM, *HARD):
        positives = [positive_passage(row) for row in rows[source]]
        accuracy = style_accuracy(positives, [row.passages[-1] for row in rows[source]])
        styles[source] = {name: round(value, 3) for name, value in asdict(accuracy).items()}
    return styles


def main() -> None:
    parser = seeds.parser(__doc__, Path("runs/negatives"))
    parser.add_argument("--collection", default="runs/pairs/man", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=300, help="training rows (default: %(default)s)")
    parser.add_argument("--backend", default="transformers", help="backend that runs SmolLM2 (default: "
        "%(default)s)")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    start, collection = time.monotonic(), options.collection
    model = train_cross_encoder(collection, options.folder)
    rows = rows_by_source(collection, options.rows, model, options.backend, options.folder)
    training = ResidualTraining()
    chosen = {objective: choose_settings(training, rows, objective, collection) for objective in SOURCES}
    settings = {objective: best for objective, (best, _) in chosen.items()}
    by_seed = [run_systems(training, rows, settings, collection, seed) for seed in options.seeds]
    systems = {system: [scores[system] for scores in by_seed] for system in by_seed[0]}
    systems["untrained"] = [training.score(training.scorer(), collection, MEASURES)]
    reranked = {
        name: retrieval.mean_of(retrieval.score(name, collection, ["rr@10"], n=NUM_RERANKED), "rr@10")
        for name in ("bm25", f"rerank:bm25|{model}@20")
    }
    result = {
        "rows": len(rows[NONE]),
        "test_queries": len(systems["untrained"][0]),
        "systems": retrieval.summarize(systems, MEASURES),
        "tests_of_ndcg@10": retrieval.compare_pairs(systems, "ndcg@10", PAIRS),
        "style": style_of(rows),
        "settings": settings,
        "ndcg@10_of_settings": {objective: means for objective, (_, means) in chosen.items()},
        "cross_encoder_rr@10": dict(
            zip(("bm25", "reranked"), (round(value, 4) for value in reranked.values()), strict=True)
        ),
        "minutes": round((time.monotonic() - start) / 60, 1),
    }
    retrieval.save(result, options.results)


if __name__ == "__main__":
    main()
