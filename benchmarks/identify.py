"""Does a language model that writes document identifiers retrieve better than BM25 and a dense encoder?

On a tiny collection, a small language model learns to write the id of the document that answers a query, from
training queries, from sentences of the documents, or from both, with three seeds each. A beam search over the
trie of all ids ranks the documents. The controls are the same model without training, the complete
SmolLM2-135M without training, BM25 and all-MiniLM-L6-v2. The trained model has only the first and the last
layers of SmolLM2-135M, so that a run takes minutes on two cores. The share of answers that are ids, and of
right ones, is also measured without the trie, on the 100 test queries of the runs' own evaluations. Runs that
are complete are not repeated.

    python benchmarks/identify.py --collection data/metatool
    python benchmarks/identify.py --collection runs/pairs/man --documents 100
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from retrieval import Scores, compare_pairs, mean_by_document, save, summarize
from seeds import CONFIGS, launch, seconds

from rlkit.envs.ranking.pairs.pages import sentences
from rlkit.envs.ranking.pairs.rows import PairRow, write_rows
from rlkit.evaluation import Evaluation
from rlkit.evaluation.result import scores_of
from rlkit.models.bundled import bundled_path
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.collections.write import write_beir
from rlkit.retrieval.documents import Document
from rlkit.retrieval.evaluate import evaluate_retriever
from rlkit.rewards.identification import read_identifier

RESULTS = Path(__file__).parent / "results" / "identify.json"
CONFIG = CONFIGS / "ranking" / "identify_sft.yaml"
MODEL, ENCODER = "bundled:smollm2-135m", "bundled:all-minilm-l6-v2"
# Without training, the loss of these six layers on text is about that of a uniform distribution. That of the
# first six is much higher, because the final norm and the head expect the outputs of the last layers.
LAYERS = (0, 1, 2, 27, 28, 29)
MEASURES = ["rr@10", "recall@1", "recall@10"]
SENTENCES, SENTENCE_WORDS = 10, 30  # maximum number of a document, and of words of a sentence
PAIRS = [
    ("untrained layers", "queries"),
    ("untrained layers", "sentences"),
    ("sentences", "both"),
    ("queries", "both"),
    ("bm25", "both"),
    ("dense", "both"),
]


def write_sample(name: str, num_documents: int | None, folder: Path) -> Path:
    """Write a collection with some of the documents of another one, in BEIR's layout, and return its folder.

    Args:
        name: Name of the collection to sample from.
        num_documents: Number of documents; None for all of them.
        folder: Folder to write to, which gets the subfolders `queries` and `sentences`. The second one has no
            training queries.
    """
    collection = load_collection(name)
    documents = list(collection.documents())
    if num_documents is not None:
        documents = random.Random(0).sample(documents, min(num_documents, len(documents)))
    ids = {document.id for document in documents}
    qrels = {
        split: {
            query: {name: grade for name, grade in grades.items() if name in ids}
            for query, grades in collection.judged(split).items()
        }
        for split in ("train", "test")
    }
    for subfolder, splits in (("queries", ["train", "test"]), ("sentences", ["test"])):
        shutil.rmtree(folder / subfolder, ignore_errors=True)
        used = {split: qrels[split] for split in splits}
        write_beir(folder / subfolder, documents, collection.queries, used)
    write_rows(folder / "pairs.jsonl", [row for document in documents for row in sentence_rows(document)])
    return folder


def sentence_rows(document: Document) -> Iterator[PairRow]:
    """Yield training pairs whose queries are the first sentences of a document."""
    for i, sentence in enumerate(sentences(document.text)[:SENTENCES]):
        query = " ".join(sentence.split()[:SENTENCE_WORDS])
        yield PairRow(f"{document.id}/{i}", query, (query,), (1.0,), "sentences", document.id)


def write_some_layers(folder: Path) -> Path:
    """Save SmolLM2-135M with `LAYERS` only, unless the folder exists, and return the folder."""
    if not folder.exists():
        from torch.nn import ModuleList
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = bundled_path(MODEL)
        model = AutoModelForCausalLM.from_pretrained(path)
        model.model.layers = ModuleList(model.model.layers[i] for i in LAYERS)
        model.config.num_hidden_layers = len(LAYERS)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


def train(system: str, seed: int, folder: Path, model: Path) -> Path:
    """Train on the queries, the sentences or both, unless the run exists, and return its folder."""
    run = folder / f"seed-{seed}-{system}"
    if not (run / "model").exists():
        subfolder = "sentences" if system == "sentences" else "queries"
        arguments = {"collection": str(folder / subfolder)}
        if system != "queries":
            arguments["pairs"] = str(folder / "pairs.jsonl")
        options = ["--environment_args", json.dumps(arguments), "--model_name_or_path", str(model)]
        launch("sft", CONFIG, seed, run, *options)
    return run


def score(retriever: str, folder: Path, num_queries: int) -> Scores:
    """Return the mean of each measure over the first test queries of each document."""
    collection = load_collection(str(folder / "queries"))
    result = evaluate_retriever(collection, retriever, n=num_queries, measures=MEASURES, depth=10)
    return mean_by_document(result["scores"], str(folder / "queries"))


def without_trie(run: Path, ids: set[str]) -> dict[str, float]:
    """Return the share of a trained model's free answers that are ids, and of those that are right."""
    evaluation = Evaluation.load(run / "evaluation" / "after.json")
    answers = [record["turns"][-1]["content"] for record in evaluation.completions]
    hits = [value for values in scores_of(evaluation).values() for value in values]
    return {
        "valid": round(sum(read_identifier(answer) in ids for answer in answers) / len(answers), 4),
        "hit": round(sum(hits) / len(hits), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collection", required=True, help="collection with the splits train and test")
    parser.add_argument("--documents", type=int, help="number of sampled documents (default: all)")
    parser.add_argument("--queries", type=int, default=200, help="number of test queries (default: 200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--folder", type=Path, default=Path("runs/identify"), help="default: runs/identify")
    options = parser.parse_args()
    name = Path(options.collection).name
    if options.documents is not None:
        name += f"-{options.documents}"
    folder = write_sample(options.collection, options.documents, options.folder / name)
    model = write_some_layers(options.folder / f"{len(LAYERS)}-layers")
    controls = {
        "bm25": "bm25",
        "dense": f"dense:{ENCODER}",
        "untrained": f"docid:{MODEL}",
        "untrained layers": f"docid:{model}",
    }
    systems = {system: [score(control, folder, options.queries)] for system, control in controls.items()}
    ids = {document.id for document in load_collection(str(folder / "queries")).documents()}
    free, minutes = {}, {}
    for system in ("queries", "sentences", "both"):
        runs = [train(system, seed, folder, model) for seed in options.seeds]
        systems[system] = [score(f"docid:{run / 'model'}", folder, options.queries) for run in runs]
        free[system] = [without_trie(run, ids) for run in runs]
        minutes[system] = [round(seconds(run) / 60, 1) for run in runs]
    result = {
        "documents": len(ids),
        "documents_with_test_queries": len(systems["bm25"][0]),
        "layers": LAYERS,
        "means": summarize(systems, MEASURES),
        "tests_of_rr@10": compare_pairs(systems, "rr@10", PAIRS),
        "without_trie": free,
        "minutes": minutes,
    }
    # The file holds the results of all collections.
    previous = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    save(previous | {name: result}, RESULTS)


if __name__ == "__main__":
    main()
