"""What do pairs without labels teach an encoder? ICT, BFS, WLP and cropping on man pages (`make pairs`).

Each run trains the same encoder from random vectors (configs/ranking/pairs.yaml). The test queries are the
one-line descriptions of half of the pages; the descriptions of the other half are the labels of "judged".
"all" has the pairs of ICT, BFS and WLP. Controls:

- "all_unseen_pages": without pairs from the pages that the test queries ask for, since pairs of those are
  pre-training on the very documents to be found; and "all_half", from a random half of the pages, which is as
  many
- "all_then_all": more steps on the same pairs, against which "all_then_judged" is to be compared
- BM25, and a MiniLM that others have trained on a billion pairs

    python scripts/build_man_collection.py -o runs/pairs/man
    python benchmarks/pairs.py
"""

import random
from pathlib import Path

import retrieval
import seeds

from rlkit.envs.ranking.pairs.rows import PairRow, read_rows, write_rows

COLLECTION = "runs/pairs/man"
SOURCES = ("ict", "bfs", "wlp")
# Arguments of scripts/make_pairs.py for each file of pairs.
FILES = {
    **{source: ["--source", source] for source in (*SOURCES, "crop", "judged")},
    "all": ["--source", *SOURCES],
    "all_unseen_pages": ["--source", *SOURCES, "--without_test_documents"],
}
HALF = "all_half"
# The system whose model a run starts from, and its file of pairs.
CONTINUED = {"all_then_judged": ("all", "judged"), "all_then_all": ("all", "all")}
BASELINES = {"bm25": "bm25", "minilm": "dense:bundled:all-minilm-l6-v2"}
MEASURES = ["rr@10", "recall@10"]
PAIRS = [
    *[("untrained", system) for system in (*SOURCES, "crop", "all", "all_unseen_pages", "judged")],
    *[("bfs", system) for system in ("ict", "wlp", "crop", "all")],
    ("judged", "all"),
    ("judged", "all_unseen_pages"),
    ("all_unseen_pages", "all_half"),
    ("all_half", "all"),
    ("all", "all_then_judged"),
    ("all_then_all", "all_then_judged"),
    *[("bm25", system) for system in ("all", "all_then_judged")],
    ("minilm", "all_then_judged"),
]
RESULTS = Path(__file__).parent / "results" / "pairs.json"


def train(system: str, pairs: str, start: Path, seed: int, folder: Path) -> Path:
    """Train a system on a file of pairs, unless its model exists, and return the model."""
    run = folder / f"seed-{seed}" / system
    if not (run / "model").exists():
        data = folder / f"seed-{seed}" / f"{pairs}.jsonl"
        if pairs == HALF:
            write_rows(data, half_of_the_documents(read_rows(data.with_name("all.jsonl")), seed))
        elif not data.exists():
            seeds.script("make_pairs", COLLECTION, *FILES[pairs], "--seed", str(seed), "-o", str(data))
        options = ["--environment_args.pairs", str(data), "--model_name_or_path", str(start)]
        config = seeds.CONFIGS / "ranking" / "pairs.yaml"
        seeds.launch("rank", config, seed, run, *options, "--evaluation_tasks", "0")
    return run / "model"


def half_of_the_documents(rows: list[PairRow], seed: int) -> list[PairRow]:
    """Return the rows of a random half of the documents."""
    documents = sorted({row.document for row in rows})
    sample = set(random.Random(seed).sample(documents, len(documents) // 2))
    return [row for row in rows if row.document in sample]


def run_seed(seed: int, folder: Path) -> dict[str, retrieval.Scores]:
    """Train all systems with one seed and return their scores."""
    encoder = folder / f"seed-{seed}" / "encoder"
    if not encoder.exists():
        seeds.script("new_encoder", "--seed", str(seed), "-o", str(encoder))
    models = {"untrained": encoder}
    for pairs in (*FILES, HALF):
        models[pairs] = train(pairs, pairs, encoder, seed, folder)
    for system, (start, pairs) in CONTINUED.items():
        models[system] = train(system, pairs, models[start], seed, folder)
    return {
        system: retrieval.score(f"dense:{model}", COLLECTION, MEASURES) for system, model in models.items()
    }


def main() -> None:
    options = seeds.parser(__doc__, Path("runs/pairs")).parse_args()
    by_seed = [run_seed(seed, options.folder) for seed in options.seeds]
    systems = {system: [scores[system] for scores in by_seed] for system in by_seed[0]}
    for system, retriever in BASELINES.items():
        systems[system] = [retrieval.score(retriever, COLLECTION, MEASURES)]
    runs = {
        system: sum(seeds.seconds(options.folder / f"seed-{seed}" / system) for seed in options.seeds)
        for system in (*FILES, HALF, *CONTINUED)
    }
    result = {
        "queries": len(systems["bm25"][0]),
        "systems": retrieval.summarize(systems, MEASURES),
        "tests_of_rr@10": retrieval.compare_pairs(systems, "rr@10", PAIRS),
        "minutes_per_seed": round(sum(runs.values()) / len(options.seeds) / 60, 1),
    }
    retrieval.save(result, RESULTS)


if __name__ == "__main__":
    main()
