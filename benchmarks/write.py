"""Does GRPO make a query writer whose rows train a better retriever? (write-v1)

MetaTool's tools are divided into five folds, and each seed writes queries for another fold, for whose tools
no training request asks. SmolLM2-135M imitates the training requests for the other tools (SFT), and is then
trained with the rewards of write-v1 (GRPO): the round trip through a frozen MiniLM, without copies, and the
learning value. It writes four queries for each unseen tool, with and without the filter of the round trip.
A residual of MiniLM's query vectors is trained on the rows and tested on requests of people for these tools.
In the second round, the retriever and the encoder of the rewards are those that the first round trained; the
control has as many more steps with the untrained ones. All rows are filtered with the untrained MiniLM.

The controls: no training, the same model with five examples and no training (Promptagator), and up to four
requests of people for each tool, which are not in the test. The settings of the residual are not tuned.
Tests are paired over the tools, because requests for one tool resemble each other.

    python benchmarks/write.py --collection data/metatool
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from residuals import ENCODER, ResidualTraining
from retrieval import Scores, compare_pairs, mean_values, save, score, summarize
from seeds import CONFIGS, launch, parser, seconds, write_fold

from rlkit.envs.ranking.pairs.filters import copied_share, source_ranks
from rlkit.envs.ranking.pairs.partial import generate_replies
from rlkit.envs.ranking.pairs.rows import PairRow, read_rows, write_rows
from rlkit.envs.ranking.pairs.selection import choose_examples
from rlkit.envs.ranking.pairs.written import FEW_SHOT, query_prompts, query_rows
from rlkit.evaluation import Evaluation
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import passage_text
from rlkit.retrieval.retrievers import open_retriever
from rlkit.rollouts.text_generation import load_text_model

RESULTS = Path(__file__).parent / "results" / "write.json"
MODEL = "bundled:smollm2-135m"
MEASURES = ("ndcg@5", "recall@5")
PER_DOCUMENT = 4  # queries that are written, and requests of people that are trained on
EXAMPLES = 5  # of the writer without training
MAX_TOKENS = 40
BATCH_SIZES = {"sft": (8, 1), "train": (16, 2)}  # completions, and batches per step
SFT_STEPS, GRPO_STEPS, SECOND_STEPS = 24, 24, 12
DOCUMENT_WORDS = 40  # in a prompt
HELD_OUT_TASKS = 24
STEPS, LEARNING_RATE = 300, 1e-3  # of the residual
TOP = 10  # of the round trip
RUNS = ("sft-run", "grpo-run", "grpo-longer-run", "grpo-second-round-run")
PAIRS = [
    ("untrained", "sft, all"),
    ("untrained", "sft, top 10"),
    ("untrained", "grpo, all"),
    ("untrained", "grpo, top 10"),
    ("sft, all", "grpo, all"),
    ("sft, top 10", "grpo, top 10"),
    ("sft, all", "sft, top 10"),
    ("grpo, all", "grpo, top 10"),
    ("few-shot, top 10", "sft, top 10"),
    ("grpo, longer, top 10", "grpo, second round, top 10"),
    ("grpo, top 10", "people"),
]


def people_rows(collection: Collection, documents: Mapping[str, str]) -> tuple[list[PairRow], set[str]]:
    """Return up to `PER_DOCUMENT` requests for each test document, at most half, and their query ids."""
    by_document: dict[str, list[str]] = {}
    for query, grades in sorted(collection.judged("test").items()):
        relevant = [name for name, grade in grades.items() if grade > 0]
        if len(relevant) == 1:
            by_document.setdefault(relevant[0], []).append(query)
    rows = [
        PairRow(query, collection.queries[query], (documents[name],), (1.0,), "people", name)
        for name, queries in by_document.items()
        for query in queries[: min(PER_DOCUMENT, len(queries) // 2)]
    ]
    return rows, {row.id for row in rows}


def train(command: str, collection: Path, seed: int, run: Path, steps: int, **changes: Any) -> Path:
    """Train with a config, unless the run exists, and return the folder of the model."""
    if not (run / "model").exists():
        config = CONFIGS / "ranking" / ("write_sft.yaml" if command == "sft" else "write.yaml")
        arguments = {"collection": str(collection), "document_words": DOCUMENT_WORDS}
        arguments |= changes.pop("environment_args", {})
        batch_size, num_batches = BATCH_SIZES[command]
        options = {
            "environment_args": json.dumps(arguments),
            "evaluation_tasks": 0 if command == "sft" else HELD_OUT_TASKS,
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": num_batches,
            "save_strategy": "no",
            **changes,
        }
        launch(command, config, seed, run, *(f"--{key}={value}" for key, value in options.items()))
    return run / "model"


def write(writer: str, model: str | Path, collection: Collection, seed: int, out: Path) -> list[PairRow]:
    """Return the rows that a model writes for the test documents; they are saved in a file."""
    if not out.exists():
        test_ids = {name for grades in collection.judged("test").values() for name, g in grades.items() if g}
        documents = [document for document in collection.documents() if document.id in test_ids]
        examples = choose_examples(collection, EXAMPLES, seed) if writer == "few-shot" else []
        prompts = query_prompts(FEW_SHOT, documents, examples, per_document=PER_DOCUMENT, seed=seed,
                                document_words=DOCUMENT_WORDS)  # fmt: skip
        text_model = load_text_model(str(model), max_tokens=MAX_TOKENS, temperature=0.7)
        partial = out.with_suffix(".partial")
        replies = generate_replies(text_model, prompts, partial, {"writer": writer, "seed": seed})
        write_rows(out, query_rows(FEW_SHOT, documents, examples, replies, per_document=PER_DOCUMENT).rows)
        partial.unlink()
    return read_rows(out)


def describe(rows: Sequence[PairRow], ranks: Sequence[int | None]) -> dict[str, float]:
    """Return the number of rows, the shares that a round trip keeps, and the share of copied trigrams."""
    return {
        "rows": len(rows),
        "distinct": len({row.query for row in rows}),
        "top_1": round(sum(rank == 1 for rank in ranks) / len(rows), 3),
        "top_10": round(sum(rank is not None for rank in ranks) / len(rows), 3),
        "copied_trigrams": round(fmean(map(copied_share, rows)), 3),
    }


class Seed:
    """The rows and scores of one seed.

    Args:
        seed: Seed of all runs.
        name: Name of the collection.
        folder: Folder of the runs.
    """

    def __init__(self, seed: int, name: str, folder: Path):
        self.seed, self.folder = seed, folder / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = write_fold(name, seed, folder)
        self.collection = load_collection(str(self.path))
        self.documents = {d.id: passage_text(d) for d in self.collection.documents()}
        self.engine = open_retriever(f"dense:{ENCODER}", self.collection)
        self.training = ResidualTraining()
        self.rows: dict[str, list[PairRow]] = {}
        self.writers: dict[str, dict[str, float]] = {}
        people, self.trained_queries = people_rows(self.collection, self.documents)
        self.rows["people"] = people

    def add(self, writer: str, model: str | Path) -> None:
        """Add the rows of a writer, all of them and those that pass the round trip."""
        out = self.folder / f"{writer.replace(', ', '-').replace(' ', '-')}.jsonl"
        rows = write(writer, model, self.collection, self.seed, out)
        ranks = source_ranks(rows, self.collection, self.engine, TOP)
        self.writers[writer] = describe(rows, ranks)
        self.rows[f"{writer}, all"] = rows
        for top in (1, TOP):
            kept_rows = [row for row, rank in zip(rows, ranks, strict=True) if rank and rank <= top]
            self.rows[f"{writer}, top {top}"] = kept_rows

    def retriever(self, rows: Sequence[PairRow], out: Path) -> Path:
        """Train MiniLM's residual on rows, save it unless it exists, and return its folder."""
        if not out.exists():
            self.train(rows).save_pretrained(out)
        return out

    def train(self, rows: Sequence[PairRow]) -> Any:
        """Return a scorer that is trained on rows."""
        return self.training.train(rows, seed=self.seed, steps=STEPS, learning_rate=LEARNING_RATE)

    def run(self) -> dict[str, Scores]:
        """Train the writers, let them write, and return the scores of a retriever per set of rows."""
        sft = train("sft", self.path, self.seed, self.folder / "sft-run", SFT_STEPS)
        grpo = train("train", self.path, self.seed, self.folder / "grpo-run", GRPO_STEPS,
                     environment_args={"encoder": ENCODER}, model_name_or_path=sft)  # fmt: skip
        for writer, model in {"few-shot": MODEL, "sft": sft, "grpo": grpo}.items():
            self.add(writer, model)
        retriever = self.retriever(self.rows["grpo, top 10"], self.folder / "retriever")
        rounds = {
            "grpo, longer": {"encoder": ENCODER},
            "grpo, second round": {"encoder": str(retriever), "retriever": f"dense:{retriever}"},
        }
        for writer, arguments in rounds.items():
            run = self.folder / f"{writer.replace(', ', '-').replace(' ', '-')}-run"
            options = {"environment_args": arguments, "model_name_or_path": grpo}
            self.add(writer, train("train", self.path, self.seed, run, SECOND_STEPS, **options))
        scores = {"untrained": self.score(self.training.scorer())}
        scores["bm25"] = self.of_test(score("bm25", str(self.path), MEASURES))
        for system, rows in self.rows.items():
            scores[system] = self.score(self.train(rows)) if rows else scores["untrained"]
        return scores

    def score(self, scorer: Any) -> Scores:
        """Return the scores of a scorer on the test requests, averaged per tool."""
        return self.of_test(self.training.score(scorer, str(self.path), MEASURES))

    def of_test(self, scores: Scores) -> Scores:
        """Return the mean scores of each tool over the requests that are not trained on."""
        by_tool: dict[str, list[Mapping[str, float]]] = {}
        for query, grades in self.collection.judged("test").items():
            if query not in self.trained_queries:
                by_tool.setdefault(min(grades), []).append(scores[query])
        return {f"{self.seed}/{tool}": mean_values(of_tool) for tool, of_tool in by_tool.items()}

    def rewards(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the mean rewards of the held-out evaluations before and after each GRPO run."""
        return {
            run: {
                name: {
                    reward: round(value, 4)
                    for reward, value in Evaluation.load(
                        self.folder / run / "evaluation" / f"{name}.json"
                    ).rewards.items()
                }
                for name in ("before", "after")
            }
            for run in RUNS[1:]
        }


def main() -> None:
    options_parser = parser(__doc__, Path("runs/write_benchmark"))
    options_parser.add_argument("--collection", default="data/metatool", help="default: data/metatool")
    options = options_parser.parse_args()
    seeds = [Seed(seed, options.collection, options.folder) for seed in options.seeds]
    by_seed = [seed.run() for seed in seeds]
    systems = {system: [scores[system] for scores in by_seed] for system in by_seed[0]}
    # Each seed has other tools: their scores are pooled for the tests.
    pooled = {
        system: [{tool: values for scores in of_system for tool, values in scores.items()}]
        for system, of_system in systems.items()
    }
    result = {
        "collection": Path(options.collection).name,
        "tools": len(pooled["untrained"][0]),
        "systems": summarize(systems, MEASURES),
        "tests_of_ndcg@5": compare_pairs(pooled, "ndcg@5", PAIRS),
        "writers": [seed.writers for seed in seeds],
        "rows": [{system: len(rows) for system, rows in seed.rows.items()} for seed in seeds],
        "rewards": [seed.rewards() for seed in seeds],
        "minutes": [
            {run: round(seconds(seed.folder / run) / 60, 1) for run in RUNS if (seed.folder / run).exists()}
            for seed in seeds
        ],
    }
    save(result, RESULTS)


if __name__ == "__main__":
    main()
