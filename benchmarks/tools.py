"""Does a model that writes queries for tools help a dense encoder, on tools that training has not seen?

MetaTool's tools are divided into five folds, and each seed tests on the requests for another fold, for whose
tools no training request asks. Held-out requests for tools of the training folds are the control.

SmolLM2-135M learns from the tools' descriptions (SFT); from there, it learns from the best of its own samples
in three rounds (RAFT), or by GRPO. MiniLM embeds its queries. The baselines are the request's own words, with
BM25 and with MiniLM, and the model without training, whose first line is its query. "request + X" fuses the
rankings of the request and of the model's query; where an answer has no query, it is the ranking of the
request. The systems are not tuned and do not have the same budget: RAFT draws 768 samples, GRPO 320. The
tests are paired over the means of the tools, because requests for one tool resemble each other. Runs and
evaluations that are complete are not repeated.

    python benchmarks/tools.py --collection data/metatool
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from retrieval import Scores, compare_pairs, mean_by_document, mean_values, save, score, summarize
from seeds import CONFIGS, launch, parser, seconds, write_fold

from rlkit.evaluation import Evaluation
from rlkit.evaluation.model import evaluate_model
from rlkit.registry import load_environment
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.engines.hybrid import fuse
from rlkit.retrieval.evaluate import score_rankings

RESULTS = Path(__file__).parent / "results" / "tools.json"
MODEL, ENCODER = "bundled:smollm2-135m", "bundled:all-minilm-l6-v2"
MEASURES = ["ndcg@5", "recall@5", "ap"]
SPLITS = {"unseen": "test", "seen": "dev"}
NUM_REQUESTS = {"unseen": 120, "seen": 60}
MAX_TOKENS = 48  # of an answer; 96% of the descriptions are shorter
BATCH_SIZES = {"sft": (8, 1), "train": (16, 2)}  # completions, and batches per step
SFT_STEPS, GRPO_STEPS = 24, 10
RAFT_ROUNDS, RAFT_STEPS, RAFT_TASKS, RAFT_SAMPLES = 3, 8, 64, 4
PAIRS = [
    ("minilm", "sft"),
    ("zero-shot", "sft"),
    ("sft", f"raft {RAFT_ROUNDS}"),
    ("sft", "grpo"),
    (f"raft {RAFT_ROUNDS}", "grpo"),
    ("minilm", "grpo"),
    ("minilm", "request + sft"),
    ("minilm", "request + grpo"),
]


def environment_args(collection: Path) -> dict:
    """Return the arguments of query-v4. With this depth, the rankings have all tools."""
    return {
        "collection": str(collection),
        "retriever": f"dense:{ENCODER}",
        "prompt_style": "tools",
        "measure": MEASURES[0],
        "max_queries": 2,
        "depth": 1000,
    }


def train(command: str, collection: Path, seed: int, run: Path, steps: int, *extra: str) -> Path:
    """Train with a config of the recipe, unless the run exists, and return the folder of the model."""
    if not (run / "model").exists():
        config = CONFIGS / "ranking" / ("tools_sft.yaml" if command == "sft" else "tools.yaml")
        options = ["--environment_args", json.dumps(environment_args(collection)), "--evaluation_tasks", "0"]
        options += ["--max_completion_length", str(MAX_TOKENS), "--max_steps", str(steps)]
        batch_size, num_batches = BATCH_SIZES[command]
        options += ["--per_device_train_batch_size", str(batch_size)]
        options += ["--gradient_accumulation_steps", str(num_batches)]
        launch(command, config, seed, run, *options, "--save_strategy", "no", *extra)
    return run / "model"


def train_all(collection: Path, seed: int, folder: Path) -> dict[str, Path]:
    """Train the systems of a seed, unless their runs exist, and return the folders of their models."""
    start = train("sft", collection, seed, folder / f"seed-{seed}-sft", SFT_STEPS)
    models = {"sft": start}
    previous = start
    for i in range(1, RAFT_ROUNDS + 1):
        round_seed = 10 * seed + i  # so that each round has other tasks
        samples = evaluate(
            previous,
            folder / f"seed-{seed}-samples-{i}.json",
            environment_args=environment_args(collection),
            evaluation_split="train",
            evaluation_tasks=RAFT_TASKS,
            seed=round_seed,
            samples=RAFT_SAMPLES,
            temperature=1.0,
        )
        options = ["--demonstrations", f"best:{samples}", "--num_tasks", str(RAFT_TASKS)]
        options += ["--model_name_or_path", str(previous)]
        run = folder / f"seed-{seed}-raft-{i}"
        previous = train("sft", collection, round_seed, run, RAFT_STEPS, *options)
        models[f"raft {i}"] = previous
    options = ["--model_name_or_path", str(start)]
    models["grpo"] = train("train", collection, seed, folder / f"seed-{seed}-grpo", GRPO_STEPS, *options)
    return models


def evaluate(model: str | Path, out: Path, **arguments) -> Path:
    """Evaluate a model on query-v4, unless the result exists, and return the path of the result."""
    if not out.exists():
        limits = {"max_completion_length": MAX_TOKENS, "dtype": "float32"}
        evaluate_model(model, "query-v4", **limits, **arguments).save(out)
    return out


def score_all(
    models: Mapping[str, Path], collection: Path, seed: int, folder: Path, kind: str
) -> dict[str, Scores]:
    """Return the scores of all systems of a seed on the requests for seen or unseen tools."""
    split, n = SPLITS[kind], NUM_REQUESTS[kind]
    arguments = environment_args(collection)
    tasks = load_environment("query-v4", **arguments).tasks(split, n)
    query_ids = dict(zip(tasks["task_id"], tasks["query_id"], strict=True))
    requests = dict(zip(tasks["query_id"], tasks["original"], strict=True))
    rankings = {"minilm": requests}
    for system, model in {"zero-shot": MODEL, **models}.items():
        system_arguments = arguments | ({"require_tag": False} if system == "zero-shot" else {})
        path = evaluate(
            model,
            folder / f"seed-{seed}-{kind}-{system.replace(' ', '-')}.json",
            environment_args=system_arguments,
            evaluation_split=split,
            evaluation_tasks=n,
        )
        # An answer without a query has no ranking.
        rankings[system] = {
            query_ids[record["task_id"]]: record["turns"][-1].get("ranking", [])
            for record in Evaluation.load(path).completions
        }
    for system in ("sft", "grpo"):
        rankings[f"request + {system}"] = {
            query: list(fuse([requests[query], ranking])) for query, ranking in rankings[system].items()
        }
    loaded = load_collection(str(collection))
    scores: dict[str, Scores] = {"bm25": score("bm25", str(collection), MEASURES, split, n)}
    for system, system_rankings in rankings.items():
        scores[system] = score_rankings(loaded, split, system_rankings, MEASURES)
    return scores


def mean_by_tool(scores: Sequence[Scores], collections: Sequence[Path], split: str) -> Scores:
    """Return the mean scores of each tool over the seeds that have requests for it."""
    by_tool: dict[str, list[Mapping[str, float]]] = {}
    for seed_scores, collection in zip(scores, collections, strict=True):
        for tool, values in mean_by_document(seed_scores, str(collection), split).items():
            by_tool.setdefault(tool, []).append(values)
    return {tool: mean_values(rows) for tool, rows in by_tool.items()}


def main() -> None:
    options_parser = parser(__doc__, Path("runs/tools_benchmark"))
    options_parser.add_argument("--collection", default="data/metatool", help="default: data/metatool")
    options = options_parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    collections = [write_fold(options.collection, seed, options.folder) for seed in options.seeds]
    scores: dict[str, dict[str, list[Scores]]] = {kind: {} for kind in SPLITS}
    minutes: dict[str, list[float]] = {}
    for seed, collection in zip(options.seeds, collections, strict=True):
        models = train_all(collection, seed, options.folder)
        for system, model in models.items():
            minutes.setdefault(system, []).append(round(seconds(model.parent) / 60, 1))
        for kind, by_system in scores.items():
            for system, values in score_all(models, collection, seed, options.folder, kind).items():
                by_system.setdefault(system, []).append(values)
    result: dict = {"collection": Path(options.collection).name, "seeds": options.seeds}
    for kind, by_system in scores.items():
        by_tool = {
            system: [mean_by_tool(values, collections, SPLITS[kind])] for system, values in by_system.items()
        }
        result[kind] = {
            "requests": [len(values) for values in by_system["minilm"]],
            "tools": len(by_tool["minilm"][0]),
            "means": summarize(by_system, MEASURES),
            **{f"tests_of_{measure}": compare_pairs(by_tool, measure, PAIRS) for measure in MEASURES},
        }
    save(result | {"minutes_of_training": minutes}, RESULTS)


if __name__ == "__main__":
    main()
