"""Do queries in other languages, fused into document vectors (xQG), help more than queries in English do?

Documents are English descriptions of Debian packages, and queries are translations of their titles. The
queries that are fused are in all languages but that of the search. The controls are the English title,
repeated as often, the queries of another document, and queries in all languages, that of the search included.

    apt-get update -o Acquire::Languages=en,de,fr,ja,ru,ko
    python benchmarks/xqg.py

A seed is a sample of documents. Samples overlap if there are few translated packages: the tests are over
documents, with the mean over a document's languages and over the samples that contain it. Embeddings are kept
in --folder. They are fused by the function that builds an index, and one index of `rlkit index --augment` is
compared with them.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from retrieval import compare_pairs, save, summarize

from rlkit.envs.ranking.pairs.rows import read_rows
from rlkit.retrieval.collections.corpus import read_corpus
from rlkit.retrieval.documents import Query, full_text
from rlkit.retrieval.encoders import encode, load_encoder
from rlkit.retrieval.engines.document_queries import fuse
from rlkit.retrieval.engines.index import open_index

SCRIPT = Path(__file__).parent.parent / "scripts" / "build_package_collection.py"
RESULTS = Path(__file__).parent / "results" / "xqg.json"
MODEL = "bundled:multilingual-e5-small"
ALPHAS = (0.01, 0.05, 0.1, 0.2, 0.5)
NONE, OTHER, ENGLISH = "no fusion", "other languages", "English"
WRONG, ALL = "other languages of another document", "all languages"
MEASURES = ("rr@10", "recall@1")
CHECKED_ALPHA, NUM_CHECKED = 0.1, 100  # of the index that is compared

Vectors = Mapping[str, np.ndarray]  # (documents, dimensions) of "documents", "en" and each language
Ranks = Mapping[str, Mapping[str, np.ndarray]]  # rank of each query's document, by system and language


def embed(collection: Path, languages: Sequence[str]) -> Vectors:
    """Return the vectors of the documents and their titles, computed once per collection."""
    file = collection / "vectors.npz"
    if not file.exists():
        encoder = load_encoder(MODEL)
        documents = [full_text(document) for document in read_corpus(str(collection))]
        vectors = {"documents": encode(encoder.encode_document, documents, None)}
        for language in ("en", *languages):
            titles = [row.query for row in read_rows(collection / "augment" / f"{language}.jsonl")]
            vectors[language] = encode(encoder.encode_query, titles, None)
        partial = file.with_name("partial.npz")
        np.savez(partial, **vectors)
        partial.replace(file)
    return dict(np.load(file))


def fused_queries(vectors: Vectors, languages: Sequence[str], language: str) -> dict[str, list[np.ndarray]]:
    """Return the vectors fused for searches in a language, by system, each in the documents' order."""
    others = [vectors[other] for other in languages if other != language]
    # The document before it in a cycle; packages next to each other in the alphabet are often related.
    cycle = np.random.default_rng(0).permutation(len(vectors["en"]))
    wrong = np.empty_like(cycle)
    wrong[cycle] = np.roll(cycle, 1)
    return {
        OTHER: others,
        ENGLISH: [vectors["en"]] * len(others),
        WRONG: [of_language[wrong] for of_language in others],
        ALL: [vectors[other] for other in languages],
    }


def fuse_all(documents: np.ndarray, queries: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """Return unit vectors of documents with one query of each array fused."""
    rows = np.tile(np.arange(len(documents)), len(queries))
    return fuse(documents, np.concatenate(queries), rows, alpha, normalize=True)


def ranks(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return the rank of each query's document, from 1. Ties count against the document."""
    scores = queries @ documents.T
    return (scores >= np.diag(scores)[:, None]).sum(1)


def rank_systems(vectors: Vectors, languages: Sequence[str]) -> Ranks:
    """Return the ranks of all systems and strengths."""
    result: dict[str, dict[str, np.ndarray]] = {}
    for language in languages:
        documents = vectors["documents"]
        result.setdefault(NONE, {})[language] = ranks(vectors[language], documents)
        for system, queries in fused_queries(vectors, languages, language).items():
            for alpha in ALPHAS:
                fused = fuse_all(documents, queries, alpha)
                result.setdefault(system_name(system, alpha), {})[language] = ranks(vectors[language], fused)
    return result


def system_name(system: str, alpha: float) -> str:
    return f"{system}, alpha {alpha:g}"


def scores_by_document(of_system: Mapping[str, np.ndarray], names: Sequence[str]) -> dict:
    """Return the measures of each document, as means over its languages."""
    values = np.stack(list(of_system.values()))
    reciprocal = np.where(values <= 10, 1 / values, 0).mean(0)
    first = (values == 1).mean(0)
    return {
        name: dict(zip(MEASURES, map(float, measures), strict=True))
        for name, *measures in zip(names, reciprocal, first, strict=True)
    }


def pool(by_seed: Sequence[Mapping[str, Mapping[str, float]]]) -> dict:
    """Return the mean of each document over the samples that contain it."""
    samples: dict[str, list[Mapping[str, float]]] = {}
    for scores in by_seed:
        for name, measures in scores.items():
            samples.setdefault(name, []).append(measures)
    return {
        name: {measure: sum(each[measure] for each in rows) / len(rows) for measure in MEASURES}
        for name, rows in samples.items()
    }


def same_as_index(collection: Path, vectors: Vectors, languages: Sequence[str], folder: Path) -> dict:
    """Return how far `rlkit index --augment` on the first documents agrees with the fused vectors."""
    language, n = languages[0], NUM_CHECKED
    folder.mkdir(parents=True, exist_ok=True)
    corpus, augment = folder / "corpus.jsonl", folder / "queries.jsonl"
    lines = (collection / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    corpus.write_text("".join(lines[:n]), encoding="utf-8")
    files = [collection / "augment" / f"{other}.jsonl" for other in languages if other != language]
    lines = [
        line for file in files for line in file.read_text(encoding="utf-8").splitlines(keepends=True)[:n]
    ]
    augment.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "rlkit", "index", str(corpus), "--engine", "dense", "--model", MODEL]
    command += ["--augment", str(augment), "--alpha", str(CHECKED_ALPHA)]
    subprocess.run([*command, "-o", str(folder / "index"), "--overwrite"], check=True)

    titles = [row.query for row in read_rows(collection / "augment" / f"{language}.jsonl")[:n]]
    results = open_index(folder / "index").search([Query(title) for title in titles], 10)
    queries = [vectors[other][:n] for other in languages if other != language]
    fused = fuse_all(vectors["documents"][:n], queries, CHECKED_ALPHA)
    scores = vectors[language][:n] @ fused.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    names = [document.id for document in read_corpus(str(corpus))]
    same = [
        [document.id for document in result.documents] == [names[row] for row in rows]
        for result, rows in zip(results, best, strict=True)
    ]
    expected = np.take_along_axis(scores, best, axis=1)
    difference = np.abs(expected - np.array([result.scores for result in results])).max()
    return {
        "language": language,
        "alpha": CHECKED_ALPHA,
        "queries": len(titles),
        "queries_with_the_same_10_documents": sum(same),
        "maximum_difference_of_scores": float(difference),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--languages", nargs="+", default=["de", "fr", "ja", "ru", "ko"])
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--lists", default="/var/lib/apt/lists", help="folder of apt's package lists")
    parser.add_argument("--folder", type=Path, default=Path("runs/xqg"))
    options = parser.parse_args()
    languages = options.languages
    if len(languages) < 2:
        parser.error("--languages needs two or more: the queries of one search are fused for the others")
    systems: dict[str, list[dict]] = {}
    by_language: dict[str, dict[str, list[float]]] = {}
    samples = []
    for seed in options.seeds:
        collection = options.folder / f"{'-'.join(languages)}-{options.documents}-seed-{seed}"
        if not (collection / "qrels" / "test.tsv").exists():
            command = [sys.executable, str(SCRIPT), "--languages", *languages, "--lists", options.lists]
            command += ["--documents", str(options.documents), "--seed", str(seed), "-o", str(collection)]
            subprocess.run(command, check=True)
        names = [document.id for document in read_corpus(str(collection))]
        vectors = embed(collection, languages)
        samples.append(set(names))
        for system, of_system in rank_systems(vectors, languages).items():
            systems.setdefault(system, []).append(scores_by_document(of_system, names))
            for language, values in of_system.items():
                mean = float(np.where(values <= 10, 1 / values, 0).mean())
                by_language.setdefault(system, {}).setdefault(language, []).append(round(mean, 4))
    check = same_as_index(collection, vectors, languages, options.folder / "check")
    pairs = []
    for alpha in ALPHAS:
        baselines = (NONE, system_name(ENGLISH, alpha), system_name(WRONG, alpha))
        pairs += [(baseline, system_name(OTHER, alpha)) for baseline in baselines]
    pooled = {system: [pool(by_seed)] for system, by_seed in systems.items()}
    result = {
        "model": MODEL,
        "seeds": options.seeds,
        "documents_per_sample": [len(sample) for sample in samples],
        "documents": len(set.union(*samples)),
        "documents_in_all_samples": len(set.intersection(*samples)),
        "alpha_times_n": {
            system: {f"{alpha:g}": round(alpha * n, 4) for alpha in ALPHAS}
            for system, n in ((OTHER, len(languages) - 1), (ALL, len(languages)))
        },
        "systems": summarize(systems, MEASURES),
        "rr@10_by_language": by_language,
        "tests": compare_pairs(pooled, "rr@10", pairs),
        "index": check,
    }
    save(result, RESULTS)


if __name__ == "__main__":
    main()
