"""Do graded passages teach a retriever more than relevant documents? Does it take a loss that sees grades?

SyCL's contrast (arXiv 2503.23239) with exact grades: for each training query of a generated collection there
are four passages that satisfy all, most, one or none of its conditions (`rlkit.envs.ranking.pairs.graded`).
Each system trains a residual of rank 64 for the queries of a frozen encoder, with 16 queries per step:

- real_infonce: a relevant document and two irrelevant ones that BM25 ranks highest (SyCL's a)
- graded_infonce: the graded passages, where 3 and 2 are relevant and 1 and 0 are not (b)
- graded_wasserstein: the graded passages with their grades (c)
- both_wasserstein: those and the documents of real_infonce, with grades 3, 1 and 1 (d)

Controls:

- both_infonce: the passages of both_wasserstein, each relevant or not, for the effect of more passages alone
- real_wasserstein: the documents of real_infonce with grades 3, 1 and 1, for the effect of the loss alone
- graded_ranknet and graded_distillation: other losses that see the grades
- no training, and BM25

The passages are drawn once. All systems take the same number of steps. For each, the learning rate and the
temperature are those of one grid (`LEARNING_RATES`, `TEMPERATURES`) with the best nDCG@10 on the dev queries
of the collection, with a seed that is not tested. The test queries are those of this collection, of one with
other names and, with --real, of any collection with judgments, for which the tests are over documents.

With --real, SmolLM2-135M also writes the four passages for some of the training queries of that collection.
They are trained on with the settings that are tuned on the generated collection. "judged" has the documents
of real_infonce for the same queries, and its settings.

    python benchmarks/graded.py --real data/metatool
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import retrieval
import torch
from residuals import ResidualTraining
from retrieval import Scores
from seeds import script

from rlkit.envs.ranking.pairs.graded import graded
from rlkit.envs.ranking.pairs.rows import PairRow, read_rows
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import passage_text
from rlkit.retrieval.queries import documents_by_id, judged_queries
from rlkit.retrieval.retrievers import open_retriever, retrieve
from rlkit.training.ranking.scorers import AdapterScorer

MEASURE = "ndcg@10"
COLLECTION, OTHER_NAMES = "generated:2000:1", "generated:2000:2"
BATCH_SIZE = 16  # queries; with four passages each, grade 3 gets 22% of the Wasserstein loss's target
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TEMPERATURES = (0.05, 0.1, 0.2, 0.5)
ROWS_SEED = 0
TUNING_SEED = 0
NUM_WRITTEN = 100  # training queries for which passages are written
BM25_DEPTH = 300  # more than the relevant documents of any query
# The objective of each system and its rows.
SYSTEMS = {
    "real_infonce": ("infonce", "real_binary"),
    "graded_infonce": ("infonce", "graded_binary"),
    "graded_wasserstein": ("wasserstein", "graded"),
    "both_wasserstein": ("wasserstein", "both"),
    "both_infonce": ("infonce", "both_binary"),
    "real_wasserstein": ("wasserstein", "real"),
    "graded_ranknet": ("ranknet", "graded"),
    "graded_distillation": ("distillation", "graded"),
}
PAIRS = [
    *[("untrained", system) for system in SYSTEMS],
    *[("real_infonce", system) for system in SYSTEMS if system != "real_infonce"],
    ("graded_infonce", "graded_wasserstein"),
    ("graded_ranknet", "graded_wasserstein"),
    ("graded_distillation", "graded_wasserstein"),
    ("graded_wasserstein", "both_wasserstein"),
    ("both_infonce", "both_wasserstein"),
]
# Systems on the queries of another collection: objective, rows, and the system with the settings.
WRITTEN_SYSTEMS = {
    "written_infonce": ("infonce", "written_binary", "graded_infonce"),
    "written_wasserstein": ("wasserstein", "written", "graded_wasserstein"),
    "judged_infonce": ("infonce", "judged", "real_infonce"),
}
WRITTEN_PAIRS = [
    *[("untrained", system) for system in WRITTEN_SYSTEMS],
    ("written_infonce", "written_wasserstein"),
    ("judged_infonce", "written_infonce"),
    ("judged_infonce", "written_wasserstein"),
]
RESULTS = Path(__file__).parent / "results" / "graded.json"


def real_rows(collection: Collection) -> dict[str, PairRow]:
    """Return a row for each training query, by its id, with grades 3, 1 and 1.

    Its passages are a random relevant document and the two best of BM25 that are not relevant; fewer if BM25
    finds no words of the query in others.
    """
    queries = judged_queries(collection, "train", None, ROWS_SEED)
    engine = open_retriever("bm25", collection)
    rankings = retrieve(engine, collection, {query.id: query.text for query in queries}, BM25_DEPTH)
    documents = documents_by_id(collection, (document.id for document in collection.documents()))
    rows = {}
    for query in queries:
        best = [name for name in query.relevant if query.grades[name] == query.ideal[0]]
        positive = random.Random(f"{ROWS_SEED} {query.id}").choice(best)
        negatives = [name for name in rankings[query.id] if name not in query.relevant][:2]
        ids = (positive, *negatives)
        passages = tuple(passage_text(documents[name]) for name in ids)
        rows[query.id] = PairRow(
            query.id,
            query.text,
            passages,
            (3.0, *[1.0] * len(negatives)),
            passage_documents=ids,
            answers=tuple(query.relevant),
        )
    return rows


def training_rows(collection: Collection) -> dict[str, list[PairRow]]:
    """Return the rows of each kind: "graded", "real", "both", and those with grades 1 and 0 alone."""
    graded_rows = list(graded(collection.name, ROWS_SEED))
    real = real_rows(collection)
    both = []
    for row in graded_rows:
        documents = real[row.id.removeprefix("graded/")]
        both.append(
            replace(
                row,
                passages=row.passages + documents.passages,
                targets=row.targets + documents.targets,
                passage_documents=row.passage_documents + documents.passage_documents,
                answers=documents.answers,
            )
        )
    rows = {"graded": graded_rows, "real": list(real.values()), "both": both}
    return rows | {f"{kind}_binary": [binary(row) for row in of_kind] for kind, of_kind in rows.items()}


def binary(row: PairRow) -> PairRow:
    """Return a row with target 1 for grades 3 and 2, and 0 for the others."""
    return replace(row, targets=tuple(float(target >= 2) for target in row.targets))


def written_rows(collection: str, folder: Path) -> dict[str, list[PairRow]]:
    """Return passages that SmolLM2 writes for training queries, and the rows of "real_binary" for them."""
    path = folder / f"written-{Path(collection).name}-{NUM_WRITTEN}.jsonl"
    if not path.exists():
        options = ["--source", "graded", "--model", "bundled:smollm2-135m", "--max_tokens", "100"]
        script("write_pairs", collection, *options, "--documents", str(NUM_WRITTEN), "-o", str(path))
    written = read_rows(path)
    real = real_rows(load_collection(collection))
    judged = [binary(real[row.id.removeprefix("graded/")]) for row in written]
    return {"written": written, "written_binary": [binary(row) for row in written], "judged": judged}


class Runs:
    """Trained residuals of the systems, which are saved so that a run is not repeated.

    Args:
        folder: Folder of the residuals.
        max_steps: Number of optimizer steps of a run.
    """

    def __init__(self, folder: Path, max_steps: int):
        self.folder, self.max_steps = folder, max_steps
        self.training = ResidualTraining()
        self.rows = training_rows(load_collection(COLLECTION))

    def scorer(self, system: str, seed: int, *, learning_rate: float, temperature: float) -> AdapterScorer:
        """Return the scorer of a system, trained unless it is in the folder.

        Args:
            system: Name of the system.
            seed: Seed of the residual and of the order of the rows.
            learning_rate: Learning rate, which decreases linearly to 0.
            temperature: Temperature of the scores.
        """
        path = self.folder / f"{system}-{learning_rate}-{temperature}-{self.max_steps}-{seed}.pt"
        if path.exists():
            scorer = self.training.scorer(seed, temperature)
            scorer.residuals.load_state_dict(torch.load(path))
            return scorer
        objective, kind = SYSTEMS[system]
        scorer = self.training.train(
            self.rows[kind],
            seed=seed,
            steps=self.max_steps,
            learning_rate=learning_rate,
            objective=objective,
            temperature=temperature,
            batch_size=BATCH_SIZE,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(scorer.residuals.state_dict(), path)
        return scorer

    def written(
        self, collection: str, tuned: Mapping[str, Mapping[str, float]], seeds: Sequence[int]
    ) -> dict[str, list[Scores]]:
        """Return the scores of the systems of `WRITTEN_SYSTEMS`, by seed. They are trained each time.

        Args:
            collection: Collection with the queries.
            tuned: Settings by system.
            seeds: Seeds.
        """
        rows = written_rows(collection, self.folder)
        systems: dict[str, list[Scores]] = {system: [] for system in WRITTEN_SYSTEMS}
        for system, (objective, kind, of_system) in WRITTEN_SYSTEMS.items():
            options = {"steps": self.max_steps, "batch_size": BATCH_SIZE, **tuned[of_system]}
            for seed in seeds:
                scorer = self.training.train(rows[kind], seed=seed, objective=objective, **options)
                systems[system].append(self.training.score(scorer, collection, [MEASURE]))
        return systems

    def tune(self, system: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return the settings of a system with the best nDCG@10 on the dev queries, and that of all."""
        means = {}
        for learning_rate, temperature in product(LEARNING_RATES, TEMPERATURES):
            scorer = self.scorer(system, TUNING_SEED, learning_rate=learning_rate, temperature=temperature)
            scores = self.training.score(scorer, COLLECTION, [MEASURE], "dev")
            means[learning_rate, temperature] = round(retrieval.mean_of(scores, MEASURE), 4)
        learning_rate, temperature = max(means, key=means.__getitem__)
        print(system, learning_rate, temperature, means[learning_rate, temperature], flush=True)
        of_all = {f"learning rate {rate}, temperature {t}": mean for (rate, t), mean in means.items()}
        return {"learning_rate": learning_rate, "temperature": temperature}, of_all


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default: 1 2 3 4 5")
    parser.add_argument("--max_steps", type=int, default=100, help="steps of a run (default: %(default)s)")
    parser.add_argument("--real", metavar="COLLECTION", help="another collection with judged test queries")
    parser.add_argument("--folder", type=Path, default=Path("runs/graded"), help="folder of the runs")
    options = parser.parse_args()
    runs = Runs(options.folder, options.max_steps)
    tuned = {system: runs.tune(system) for system in SYSTEMS}
    result: dict = {
        "max_steps": options.max_steps,
        "tuning": {
            system: {**settings, f"dev_{MEASURE}": of_all} for system, (settings, of_all) in tuned.items()
        },
        "collections": {},
    }
    for name in filter(None, (COLLECTION, OTHER_NAMES, options.real)):
        systems = {
            "bm25": [retrieval.score("bm25", name, [MEASURE])],
            "untrained": [runs.training.score(runs.training.scorer(), name, [MEASURE])],
        }
        for system, (settings, _) in tuned.items():
            scorers = [runs.scorer(system, seed, **settings) for seed in options.seeds]
            systems[system] = [runs.training.score(scorer, name, [MEASURE]) for scorer in scorers]
        if name == options.real:
            settings_of = {system: settings for system, (settings, _) in tuned.items()}
            systems |= runs.written(name, settings_of, options.seeds)
        # Queries for one document resemble each other, if most queries have a single one.
        by_document = systems
        if name == options.real:
            by_document = {
                system: [retrieval.mean_by_document(scores, name) for scores in by_seed]
                for system, by_seed in systems.items()
            }
        result["collections"][Path(name).name] = {
            "queries": len(systems["bm25"][0]),
            "systems": retrieval.summarize(systems, [MEASURE]),
            f"tests_of_{MEASURE}": retrieval.compare_pairs(by_document, MEASURE, PAIRS),
        }
        if name == options.real:
            tests = retrieval.compare_pairs(by_document, MEASURE, WRITTEN_PAIRS)
            result["collections"][Path(name).name]["tests_of_written_passages"] = tests
    retrieval.save(result, RESULTS)


if __name__ == "__main__":
    main()
