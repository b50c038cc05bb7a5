"""Does a ranker learn from word sets to rank for real queries? PROP and B-PROP on man pages, three seeds.

No run sees a query. The cross-encoders rerank BM25's first 20 pages for NAME lines, and the encoders retrieve
from all pages. The controls are the same models before training, when the cross-encoder's head is random.
Two checks need no queries: the share of pairs whose first set also has the higher BM25 score for the
document, and the effective support of B-PROP's words, 1 if they are drawn uniformly, at several temperatures.

    python scripts/build_man_collection.py -o runs/pairs/man
    python benchmarks/prop.py
"""

import json
from collections.abc import Sequence
from pathlib import Path

import retrieval
import seeds
import transformers

from rlkit.envs.ranking.pairs.attention import bprop, effective_support, word_contrasts
from rlkit.envs.ranking.pairs.rows import PairRow, write_rows
from rlkit.envs.ranking.pairs.words import prop
from rlkit.files import atomic_write
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.cross_encoders import load_cross_encoder
from rlkit.retrieval.documents import Document, Query, search_ids
from rlkit.retrieval.encoders import load_encoder
from rlkit.retrieval.retrievers import open_retriever
from rlkit.training.ranking.cross import CrossScorer

RESULTS = Path(__file__).parent / "results" / "prop.json"
CONFIG = seeds.CONFIGS / "ranking" / "prop.yaml"
COLLECTION = "runs/pairs/man"
ENCODER, MAX_SEQ_LENGTH = "bundled:all-minilm-l6-v2", 128
NUM_QUERIES, DEPTH = 100, 20
TEMPERATURES = (1.0, 0.1, 0.01)
MEASURE = "rr@10"
COMPARISONS = [
    ("random head", "prop, cross-encoder"),
    ("random head", "bprop, cross-encoder"),
    ("bm25", "prop, cross-encoder"),
    ("bm25", "bprop, cross-encoder"),
    ("prop, cross-encoder", "bprop, cross-encoder"),
    ("encoder", "prop, encoder"),
]
# The config trains a cross-encoder. These keys train the encoder on the same pairs, with a lower learning
# rate, because none of its weights are new.
ENCODER_KEYS = [
    *("--cross_encoder", "false", "--objective", "ranknet", "--learning_rate", "2e-5"),
    *("--first_stage_documents", "0"),
]


def load_contrasts(documents: Sequence[Document], folder: Path) -> list[dict[str, float]]:
    """Return the contrasts of B-PROP, which take a minute or two, from a file if it exists."""
    path = folder / "contrasts.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(word_contrasts(documents, ENCODER)))
    return json.loads(path.read_text())


def bm25_agreement(rows: Sequence[PairRow]) -> float:
    """Return the share of pairs whose first set has the higher BM25 score. Ties count half."""
    loaded = load_collection(COLLECTION)
    engine = open_retriever("bm25", loaded)
    num_documents = sum(1 for _ in loaded.documents())
    agreement = 0.0
    for row in rows:
        scores = []
        for ranking in search_ids(engine, [Query(passage) for passage in row.passages], num_documents):
            # Documents without a word of the query are not in its ranking.
            scores.append(dict(zip(ranking.ids, ranking.scores, strict=True)).get(row.document, 0.0))
        agreement += 1.0 if scores[0] > scores[1] else 0.5 * (scores[0] == scores[1])
    return agreement / len(rows)


def untrained_models(folder: Path, seed: int) -> tuple[Path, Path]:
    """Save and return the cross-encoder and the encoder with which `rlkit rank` begins."""
    cross_encoder, encoder = folder / f"{seed}-random-head", folder / "encoder"
    if not cross_encoder.exists():
        transformers.set_seed(seed)
        model = load_cross_encoder(ENCODER, new_head=True, max_seq_length=MAX_SEQ_LENGTH)
        CrossScorer(model, 1.0).save_pretrained(cross_encoder)
    if not encoder.exists():
        load_encoder(ENCODER, max_seq_length=MAX_SEQ_LENGTH).save_pretrained(str(encoder))
    return cross_encoder, encoder


def train(folder: Path, name: str, pairs: Path, seed: int, *options: str) -> Path:
    """Train a model on pairs, unless the run exists, and return the folder of the model."""
    out = folder / f"{seed}-{name}"
    if not (out / "model").exists():
        keys = ["--environment_args.pairs", str(pairs), "--evaluation_tasks", "0", *options]
        seeds.launch("rank", CONFIG, seed, out, *keys)
    return out / "model"


def main() -> None:
    """Write the pairs, train and score all systems, and save the result."""
    options = seeds.parser(__doc__, Path("runs/prop_benchmark")).parse_args()
    documents = list(load_collection(COLLECTION).documents())
    contrasts = load_contrasts(documents, options.folder)

    def score(retriever: str) -> retrieval.Scores:
        return retrieval.score(retriever, COLLECTION, [MEASURE], n=NUM_QUERIES)

    def rerank(model: Path) -> retrieval.Scores:
        return score(f"rerank:bm25|{model}@{DEPTH}")

    systems: dict[str, list[retrieval.Scores]] = {"bm25": [score("bm25")]}
    agreement: dict[str, list[float]] = {"prop": [], "bprop": []}
    for seed in options.seeds:
        random_head, encoder = untrained_models(options.folder, seed)
        systems.setdefault("random head", []).append(rerank(random_head))
        if "encoder" not in systems:
            systems["encoder"] = [score(f"dense:{encoder}")]
        rows = {
            "prop": list(prop(documents, seed=seed)),
            "bprop": list(bprop(documents, contrasts, seed=seed)),
        }
        for source, of_source in rows.items():
            agreement[source].append(round(bm25_agreement(of_source), 4))
            pairs = options.folder / f"{source}-{seed}.jsonl"
            write_rows(pairs, of_source)
            model = train(options.folder, source, pairs, seed)
            systems.setdefault(f"{source}, cross-encoder", []).append(rerank(model))
        pairs = options.folder / f"prop-{seed}.jsonl"
        model = train(options.folder, "prop-encoder", pairs, seed, *ENCODER_KEYS)
        systems.setdefault("prop, encoder", []).append(score(f"dense:{model}"))
    result = {
        "seeds": options.seeds,
        "queries": len(systems["bm25"][0]),
        "systems": retrieval.summarize(systems, [MEASURE]),
        "comparisons": retrieval.compare_pairs(systems, MEASURE, COMPARISONS),
        "bm25_agreement": agreement,
        "effective_support": {str(t): round(effective_support(contrasts, t), 4) for t in TEMPERATURES},
    }
    retrieval.save(result, RESULTS)


if __name__ == "__main__":
    main()
