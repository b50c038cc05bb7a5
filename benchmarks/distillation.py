"""Does InfoNCE on synthetic queries lower a strong retriever, and does distillation prevent it?

The claim is that of "Conventional Contrastive Learning Often Falls Short" (arXiv 2502.19712), on man pages
and at the size of a CPU. SmolLM2 writes queries of six types for some of the pages, once. Each of five folds
has a teacher of its own, a cross-encoder trained on the fold's real training queries. The student, a residual
of MiniLM's query embedding, is trained on the written queries in these ways:

- "infonce": the page of a query against the pages of the other queries in the batch, temperature 0.01
- "infonce, filtered": the same, only with queries whose page the teacher ranks first
- "kl": the divergence from the teacher's scores of a list of candidates
- "kl, filtered": only with queries whose page the teacher ranks first
- "kl + infonce": with 0.1 times InfoNCE, whose negatives are the candidates of other queries

A cross-encoder that is trained on four hundred queries may well be a worse ranker than MiniLM, which was
trained on a billion pairs. So there is a second teacher: "mixed" is the mean of the scaled scores of the
cross-encoder and of MiniLM. The rankings of both teachers are in the results, since a teacher that ranks
worse than its student may have little to teach. The learning rate of each system is the best one on the
fold's dev queries; the means of all learning rates are in the results, too. Each query is a test query of one
fold, and the tests are over the queries of all folds. The teachers rerank the first ten fused candidates; the
students rank all pages. Queries are also written for pages that test queries ask for; the judgments are not
used.

    python scripts/build_man_collection.py -o runs/pairs/man
    python benchmarks/distillation.py
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from residuals import ResidualTraining
from retrieval import Scores, compare_pairs, mean_of, save, score, summarize
from seeds import CONFIGS, launch, script, seconds

from rlkit.envs.ranking.pairs.rows import PairRow, read_rows
from rlkit.envs.ranking.pairs.teacher import (
    candidate_lists,
    normalize_scores,
    score_lists,
    teacher_ranks,
    with_targets,
)
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.cross_encoders import load_cross_encoder
from rlkit.retrieval.measures import Evaluator
from rlkit.training.ranking.scorers import AdapterScorer

RESULTS = Path(__file__).parent / "results" / "distillation.json"
WRITER = "bundled:smollm2-135m"
RETRIEVERS = ("bm25", "dense:bundled:all-minilm-l6-v2")
NUM_FOLDS = 5
LIST_LENGTH = 10
MAX_SEQ_LENGTH = 64  # of a pair of the cross-encoder
MEASURES = ("rr@10", "recall@10")
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
INFONCE = {"objective": "infonce", "temperature": 0.01}
KL = {"objective": "distillation", "infonce_weight": 0.0}
BOTH = {"objective": "distillation", "infonce_weight": 0.1}
PAIRS = [
    *[("untrained", system) for system in ("infonce", "infonce, filtered", "kl", "kl, mixed")],
    ("infonce", "infonce, filtered"),
    ("infonce", "kl"),
    ("infonce, filtered", "kl, filtered"),
    ("infonce", "kl, mixed"),
    ("kl", "kl + infonce"),
    ("kl, mixed", "kl + infonce, mixed"),
    ("untrained", "teacher"),
    ("untrained", "mixed teacher"),
    ("kl", "teacher"),
    ("kl, mixed", "mixed teacher"),
]


class Teachers(NamedTuple):
    """Scores of the passages of lists, scaled to [0, 1], and the cross-encoder's own.

    Attributes:
        raw: Scores of the cross-encoder.
        cross: Its scaled scores.
        mixed: Mean of its scaled scores and those of the untrained student.
    """

    raw: list[np.ndarray]
    cross: list[np.ndarray]
    mixed: list[np.ndarray]


def write_queries(options: argparse.Namespace) -> list[PairRow]:
    """Return the written queries as pairs. They are the same in all folds."""
    path = options.folder / f"six-{options.documents}.jsonl"
    if not path.exists():
        arguments = ["--source", "six", "--model", WRITER, "--documents", str(options.documents)]
        script("write_pairs", options.collection, *arguments, "--max_tokens", "32", "-o", str(path))
    return read_rows(path)


def train_teacher(options: argparse.Namespace, fold: int) -> Path:
    """Train the cross-encoder of a fold, unless the run exists, and return its folder."""
    run = options.folder / f"teacher-{fold}"
    if not (run / "model").exists():
        environment_args = {"collection": options.collection, "retriever": "bm25", "candidates": 8}
        environment_args |= {"folds": NUM_FOLDS, "fold": fold}
        arguments = ["--environment_args", json.dumps(environment_args), "--evaluation_tasks", "0"]
        arguments += ["--max_seq_length", str(MAX_SEQ_LENGTH), "--max_steps", str(options.teacher_steps)]
        launch("rank", CONFIGS / "ranking" / "cross_encoder.yaml", fold, run, *arguments)
    return run


def teacher_scores(lists: Sequence[PairRow], model: Path, training: ResidualTraining) -> Teachers:
    """Return the scores of both teachers for the passages of each list."""
    raw = score_lists(lists, load_cross_encoder(str(model), max_seq_length=MAX_SEQ_LENGTH))
    student = training.scorer()
    similarities = []
    with torch.no_grad():
        for row in lists:
            query = student.embed([row.query], "query")
            similarities.append((query @ student.embed(row.passages, "document").T)[0].numpy())
    cross = normalize_scores(raw)
    pairs = zip(cross, normalize_scores(similarities), strict=True)
    return Teachers(raw, cross, [(first + second) / 2 for first, second in pairs])


def score_reranking(
    lists: Sequence[PairRow], targets: Sequence[np.ndarray], judged: Mapping[str, Mapping[str, int]]
) -> Scores:
    """Return the value of each measure for the candidates of test queries in the order of their targets."""
    evaluator = Evaluator(judged, MEASURES)
    scores = {}
    for row, row_targets in zip(lists, targets, strict=True):
        order = np.argsort(-row_targets, kind="stable")
        scores[row.id] = evaluator(row.id, [row.passage_documents[i] for i in order])
    return scores


def test_lists(options: argparse.Namespace, judged: Mapping[str, Mapping[str, int]]) -> list[PairRow]:
    """Return the candidates of test queries, found without knowledge of their relevant documents."""
    collection = load_collection(options.collection)
    rows = []
    for name, grades in judged.items():
        query = collection.queries[name]
        rows.append(PairRow(name, query, (query,), (1.0,), document=min(grades)))
    # A list of one more has the relevant document last if the retrievers have not found it.
    lists = candidate_lists(rows, collection, RETRIEVERS, length=LIST_LENGTH + 1)
    return [
        PairRow(
            row.id,
            row.query,
            row.passages[:LIST_LENGTH],
            row.targets[:LIST_LENGTH],
            passage_documents=row.passage_documents[:LIST_LENGTH],
        )
        for row in lists
    ]


def run_fold(
    options: argparse.Namespace, fold: int, lists: Sequence[PairRow], training: ResidualTraining
) -> tuple[dict[str, Scores], dict]:
    """Train a fold's teacher and students.

    Returns:
        Scores of the fold's test queries by system, and numbers of the fold.
    """
    collection = load_collection(options.collection).folds(NUM_FOLDS, fold)
    test, dev = collection.judged("test"), collection.judged("dev")
    run = train_teacher(options, fold)
    teachers = teacher_scores(lists, run / "model", training)
    is_first = [rank == 1 for rank in teacher_ranks(lists, teachers.raw)]
    pairs = [pair_of(row) for row in lists]
    cross, mixed = with_targets(lists, teachers.cross), with_targets(lists, teachers.mixed)
    rows_of = {
        "infonce": (pairs, INFONCE),
        "infonce, filtered": (keep(pairs, is_first), INFONCE),
        "kl": (cross, KL),
        "kl, filtered": (keep(cross, is_first), KL),
        "kl + infonce": (cross, BOTH),
        "kl, mixed": (mixed, KL),
        "kl + infonce, mixed": (mixed, BOTH),
    }
    reranked = test_lists(options, test)
    of_test = teacher_scores(reranked, run / "model", training)
    untrained = all_scores(options.collection, training, training.scorer())
    systems = {
        "untrained": {query: untrained[query] for query in test},
        "teacher": score_reranking(reranked, of_test.cross, test),
        "mixed teacher": score_reranking(reranked, of_test.mixed, test),
    }
    by_rate: dict[str, dict[str, float]] = {}
    chosen: dict[str, float] = {}
    for system, (rows, settings) in rows_of.items():
        candidates = {}
        for rate in LEARNING_RATES:
            scorer = training.train(rows, seed=fold, steps=options.steps, learning_rate=rate, **settings)
            candidates[rate] = all_scores(options.collection, training, scorer)

        def dev_mean(rate: float, of_rate: Mapping[float, Scores] = candidates) -> float:
            return mean_of({query: of_rate[rate][query] for query in dev}, MEASURES[0])

        chosen[system] = max(LEARNING_RATES, key=dev_mean)
        by_rate[system] = {
            f"{rate:g}": round(mean_of({query: scores[query] for query in test}, MEASURES[0]), 4)
            for rate, scores in candidates.items()
        }
        systems[system] = {query: candidates[chosen[system]][query] for query in test}
    numbers = {
        "rows_with_the_source_first": sum(is_first),
        "learning_rates": chosen,
        "by_learning_rate": by_rate,
        "minutes_of_the_teacher": round(seconds(run) / 60, 1),
    }
    return systems, numbers


def all_scores(collection: str, training: ResidualTraining, scorer: AdapterScorer) -> Scores:
    """Return the value of each measure for all judged queries of a collection."""
    scores: dict[str, Mapping[str, float]] = {}
    for split in load_collection(collection).qrels:
        scores |= training.score(scorer, collection, MEASURES, split)
    return scores


def pair_of(row: PairRow) -> PairRow:
    """Return the pair of a list's query and its source document."""
    passage = row.passages[row.passage_documents.index(row.document)]
    return PairRow(row.id, row.query, (passage,), (1.0,), row.source, row.document)


def keep(rows: Sequence[PairRow], conditions: Sequence[bool]) -> list[PairRow]:
    """Return the rows whose condition is true."""
    return [row for row, condition in zip(rows, conditions, strict=True) if condition]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", default="runs/pairs/man", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("runs/distillation"), help="folder of the runs")
    parser.add_argument("--documents", type=int, default=100, help="documents to write six queries for each")
    parser.add_argument("--teacher_steps", type=int, default=100, help="steps of the cross-encoder")
    parser.add_argument("--steps", type=int, default=100, help="steps of a student")
    options = parser.parse_args()
    rows = write_queries(options)
    collection = load_collection(options.collection)
    lists = candidate_lists(rows, collection, RETRIEVERS, length=LIST_LENGTH)
    training = ResidualTraining()
    folds = [run_fold(options, fold, lists, training) for fold in range(NUM_FOLDS)]
    # Each query is a test query of one fold.
    systems: dict[str, dict] = {}
    for fold_systems, _ in folds:
        for system, scores in fold_systems.items():
            systems.setdefault(system, {}).update(scores)
    systems["bm25"] = {}
    for split in collection.qrels:
        systems["bm25"].update(score("bm25", options.collection, MEASURES, split))
    pooled = {system: [scores] for system, scores in systems.items()}
    result = {
        "documents": options.documents,
        "rows": len(rows),
        "queries": len(systems["untrained"]),
        "means": summarize(pooled, MEASURES),
        f"tests_of_{MEASURES[0]}": compare_pairs(pooled, MEASURES[0], PAIRS),
        "folds": [numbers for _, numbers in folds],
    }
    save(result, RESULTS)


if __name__ == "__main__":
    main()
