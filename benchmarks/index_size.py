"""Size, speed and recall of exact and approximate dense indexes of 100,000, 300,000 and 1,000,000 vectors.

Encoding a million passages takes hours without a GPU, so the vectors are generated from real embeddings of
the bundled encoder: of 12,000 passages of 25 words from the docstrings of installed Python packages. Queries
are spans of 8 words from other passages, encoded as queries: one half sets the number of lists that a search
probes (as `rlkit index --approximate` does), the other half is measured. Two kinds of vectors are generated:

- "like embeddings": a real embedding, moved toward one of its neighbors, plus the difference between a random
  embedding and a neighbor of it. Every direction in which a vector varies is one in which real ones do.
- "isotropic noise": a real embedding plus Gaussian noise of the same length in all 384 dimensions. Neighbors
  are at almost equal distances in such data, which is harder to search than text.

Each measurement is made in a process of its own, with one thread. The results of the sizes and kinds that are
not measured stay in the JSON file. The first run takes half an hour, with `--reuse` three minutes.

    python benchmarks/index_size.py --folder /tmp/index_size
    python benchmarks/index_size.py --folder /tmp/index_size --reuse
"""

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil

from rlkit.models.fingerprint import model_fingerprint
from rlkit.retrieval.cache import write_json
from rlkit.retrieval.documents import Document, Query
from rlkit.retrieval.encoders import encode, load_encoder
from rlkit.retrieval.engines.approximate import InvertedLists, build_lists, exact_neighbors, recalls
from rlkit.retrieval.engines.dense import EMBEDDINGS, FOLDER, Dense
from rlkit.retrieval.store import HEADER, no_progress, read_header, write_documents

RESULT = Path(__file__).parent / "results" / "index_size.json"
MODEL = "bundled:all-minilm-l6-v2"
PACKAGES = ("numpy", "scipy", "sklearn", "pandas")
BASE, QUERIES, PASSAGE_WORDS, QUERY_WORDS = 12_000, 1000, 25, 8
NEIGHBORS = 20  # of a real embedding, which give the directions in which generated ones vary
SIZES = (100_000, 300_000, 1_000_000)
KINDS = ("like embeddings", "isotropic noise")
BLOCK = 50_000
WIKIPEDIA = 21_015_324  # passages of DPR's Wikipedia


def passages() -> list[str]:
    """Return passages of docstrings of the standard library and of installed packages, shuffled."""
    paths = sysconfig.get_paths()
    folders = [Path(paths["stdlib"]), *(Path(paths["purelib"], package) for package in PACKAGES)]
    words = []
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            if folder == folders[0] and "site-packages" in file.parts:
                continue
            words += " ".join(docstrings(file)).split()
    starts = range(0, len(words) - PASSAGE_WORDS, PASSAGE_WORDS)
    texts = [" ".join(words[start : start + PASSAGE_WORDS]) for start in starts]
    random.Random(0).shuffle(texts)
    return list(dict.fromkeys(texts))[: BASE + QUERIES]


def docstrings(file: Path) -> Iterator[str]:
    """Yield the docstrings of a Python file."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def encode_passages(folder: Path) -> float:
    """Write the real embeddings and the queries, and return the passages encoded per second."""
    texts, encoder = passages(), load_encoder(MODEL)
    assert len(texts) == BASE + QUERIES, f"the installed packages have only {len(texts)} passages"
    start = time.perf_counter()
    np.save(folder / "base.npy", encode(encoder.encode_document, texts[:BASE], None))
    rate = BASE / (time.perf_counter() - start)
    rng = random.Random(1)
    spans = []
    for text in texts[BASE:]:
        words = text.split()
        first = rng.randrange(len(words) - QUERY_WORDS)
        spans.append(" ".join(words[first : first + QUERY_WORDS]))
    np.save(folder / "queries.npy", encode(encoder.encode_query, spans, None))
    (folder / "queries.json").write_text(json.dumps(spans))
    (folder / "rate.json").write_text(json.dumps(rate))
    return rate


def generate(base: np.ndarray, size: int, kind: str) -> Iterator[np.ndarray]:
    """Yield blocks of unit vectors."""
    rng = np.random.default_rng(0)
    near = np.stack([rows[1:] for rows, _ in exact_neighbors(base, base, NEIGHBORS + 1)])
    for start in range(0, size, BLOCK):
        n = min(BLOCK, size - start)
        seeds = rng.integers(len(base), size=n)
        vectors = base[seeds]
        if kind == "isotropic noise":
            noise = rng.standard_normal(vectors.shape, np.float32)
            vectors = vectors + noise / np.linalg.norm(noise, axis=1, keepdims=True)
        else:
            toward = base[near[seeds, rng.integers(NEIGHBORS, size=n)]]
            others = rng.integers(len(base), size=n)
            difference = base[others] - base[near[others, rng.integers(NEIGHBORS, size=n)]]
            share = rng.uniform(0, 0.5, (n, 1)).astype(np.float32)
            vectors = vectors + share * (toward - vectors) + 0.5 * difference
        yield (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def neighbor_cosines(vectors: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """Return the mean cosine of a query to its neighbors of some ranks."""
    scores = np.stack([scores for _, scores in exact_neighbors(queries, vectors, 1000)])
    return {str(rank): round(float(scores[:, rank - 1].mean()), 3) for rank in (1, 10, 100, 1000)}


def compare_with_real(data: Path) -> dict[str, dict[str, float]]:
    """Return the cosines of the queries to their neighbors among as many real and generated vectors."""
    base, queries = np.load(data / "base.npy"), np.load(data / "queries.npy")
    result = {"real embeddings": neighbor_cosines(base, queries)}
    for kind in KINDS:
        vectors = np.concatenate(list(generate(base, len(base), kind)))
        result[kind] = neighbor_cosines(vectors, queries)
    return result


def build(folder: Path, data: Path, size: int, kind: str) -> dict:
    """Build an index folder from generated vectors, as `rlkit index --approximate` does from encoded ones."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_documents(folder, (Document(str(i), "", f"Passage {i}.") for i in range(size)), None)
    base, queries = np.load(data / "base.npy"), np.load(data / "queries.npy")
    path = folder / FOLDER / EMBEDDINGS
    shape = (size, base.shape[1])
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    done = 0
    for block in generate(base, size, kind):
        vectors[done : done + len(block)] = block
        done += len(block)
    vectors.flush()
    start = time.perf_counter()
    lists = build_lists(folder / FOLDER, vectors, queries[: QUERIES // 2], 0.95, no_progress)
    seconds = time.perf_counter() - start
    settings = {
        **{"model": MODEL, "model_fingerprint": model_fingerprint(MODEL), "query_prefix": None},
        **{"passage_prefix": None, "similarity": "cosine", "approximate": lists, "build_seconds": seconds},
    }
    header = {**read_header(folder), "engine": "dense", "settings": settings}
    write_json(folder / HEADER, header)
    return header


def milliseconds(calls: Iterable) -> dict[str, float]:
    """Return percentiles of the milliseconds that each item of a generator takes."""
    times = []
    iterator = iter(calls)
    while True:
        start = time.perf_counter()
        if next(iterator, None) is None:
            break
        times.append(1000 * (time.perf_counter() - start))
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    return {"mean": round(float(np.mean(times)), 2)} | {
        name: round(float(value), 2) for name, value in (("p50", p50), ("p95", p95), ("p99", p99))
    }


def measure_approximate(folder: Path, data: Path) -> dict:
    """Open the index as a user does, in this fresh process, and search it query by query."""
    queries = np.load(data / "queries.npy")[QUERIES // 2 :]
    process = psutil.Process()
    load_encoder(MODEL).encode(["warm-up"], show_progress_bar=False)  # imports torch, reads the weights
    before = process.memory_info().rss
    start = time.perf_counter()
    engine = Dense(folder)
    seconds = time.perf_counter() - start
    vectors, documents = engine._vectors, engine.documents
    lists = engine._lists
    assert lists is not None
    list(lists.search(queries[:50], 10))  # the pages of the file are read once
    times = milliseconds(
        [documents.ids(rows) for rows, _ in lists.search(query[None], 10)] for query in queries
    )
    deep = milliseconds(
        [documents.ids(rows) for rows, _ in lists.search(query[None], 1000)] for query in queries[:100]
    )
    texts = json.loads((data / "queries.json").read_text())[QUERIES // 2 :][:200]
    with_encoder = milliseconds(engine.search([Query(text)], 10) for text in texts)
    rss = process.memory_info().rss
    np.save(folder / "approximate.npy", [rows for rows, _ in lists.search(queries, 10)])
    return {
        "open_seconds": round(seconds, 2),
        "rss_mb": round(rss / 1e6),
        "rss_mb_of_torch_and_encoder": round(before / 1e6),
        "ms": times,
        "ms_at_depth_1000": deep,
        "ms_with_encoding_and_documents": with_encoder,
        "vectors": len(vectors),
    }


def measure_flat(folder: Path, data: Path) -> dict:
    """Search the embeddings exactly, query by query, and compare the results of both searches."""
    queries = np.load(data / "queries.npy")[QUERIES // 2 :]
    vectors = np.load(folder / FOLDER / EMBEDDINGS, mmap_mode="r")
    exact_neighbors(queries[:2], vectors, 10)
    times = milliseconds(exact_neighbors(query[None], vectors, 10) for query in queries[:20])
    # In the same process, so that both were measured at the same load of the machine.
    settings = read_header(folder)["settings"]["approximate"]
    lists = InvertedLists(folder / FOLDER, vectors, settings["probes"])
    lists.search(queries[:50], 10)
    approximate = milliseconds(lists.search(query[None], 10) for query in queries)
    exact = exact_neighbors(queries, vectors, 1000)
    result: dict = {"flat_ms": times, "approximate_ms": approximate}
    result["flat_to_approximate"] = round(times["p50"] / approximate["p50"], 1)
    for depth in (10, 100, 1000):
        shares = recalls(lists.search(queries, depth), exact, depth)
        result[f"recall@{depth}"] = round(float(shares.mean()), 4)
    result["rss_mb"] = round(psutil.Process().memory_info().rss / 1e6)
    return result


def run_alone(part: str, folder: Path, data: Path) -> dict:
    """Run a measurement in a fresh process with one thread, and return its result."""
    command = [sys.executable, __file__, "--folder", str(data), "--part", part, "--index", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    completed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(completed.stdout.splitlines()[-1])


def measure(data: Path, size: int, kind: str, *, reuse: bool) -> dict:
    """Return the measurements of one size and kind of vectors."""
    folder = data / f"{kind.replace(' ', '_')}_{size}"
    if not (reuse and (folder / HEADER).exists()):
        build(folder, data, size, kind)
    settings = read_header(folder)["settings"]
    files = {name: (folder / FOLDER / name).stat().st_size / 1e6 for name in (EMBEDDINGS, "lists.faiss")}
    return {
        "build_seconds": round(settings["build_seconds"]),
        "megabytes": {name: round(value) for name, value in files.items()},
        **settings["approximate"],
        "fresh process": run_alone("approximate", folder, data),
        "compared": run_alone("flat", folder, data),
    }


def extrapolate(results: dict, rate: float) -> dict:
    """Return what the vectors of 21 million passages need, from the measurements of the largest size.

    Files, encoding and exact search grow with the number of vectors n. About the same number of lists is
    searched at every size, and their number and length grow with the square root of n: so does the time of an
    approximate search. k-means and the assignment compare vectors with all centers: they grow with n ** 1.5.
    All of them grow with the number of dimensions.
    """
    size = SIZES[-1]
    measured, growth = results[str(size)], WIKIPEDIA / size
    compared = measured["compared"]
    result: dict = {}
    for dimensions in (384, 768):
        factor = dimensions / 384
        result[f"{dimensions} dimensions"] = {
            "embeddings_gb": round(4 * dimensions * WIKIPEDIA / 1e9, 1),
            "lists_gb": round((dimensions + 8) * WIKIPEDIA / 1e9, 1),
            "build_hours": round(measured["build_seconds"] * factor * growth**1.5 / 3600, 1),
            "flat_ms": round(compared["flat_ms"]["p50"] * factor * growth),
            "approximate_ms": round(compared["approximate_ms"]["p50"] * factor * growth**0.5, 1),
        }
    result["hours to encode, 384 dimensions"] = round(WIKIPEDIA / rate / 3600)
    return result


def main() -> None:
    """Build and measure, and write the result after each size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="folder of the indexes, about 10 GB")
    parser.add_argument("--reuse", action="store_true", help="measure the indexes that are in the folder")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--part", choices=("approximate", "flat"), help="internal: one measurement")
    parser.add_argument("--index", type=Path, help="internal: index of that measurement")
    options = parser.parse_args()
    if options.part:
        parts = {"approximate": measure_approximate, "flat": measure_flat}
        print(json.dumps(parts[options.part](options.index, options.folder)))
        return
    data = options.folder
    data.mkdir(parents=True, exist_ok=True)
    if not (options.reuse and (data / "rate.json").exists()):
        encode_passages(data)
    rate = json.loads((data / "rate.json").read_text())
    result: dict = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result[f"cosine of the n-th neighbor among {BASE:,}"] = compare_with_real(data)
    result |= {"dimensions": 384, "threads": 1, "passages encoded per second": round(rate, 1)}
    for kind in options.kinds:
        for size in options.sizes:
            result.setdefault(kind, {})[str(size)] = measure(data, size, kind, reuse=options.reuse)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
    if all(str(size) in result.get(KINDS[0], {}) for size in SIZES):
        result["21 million passages, extrapolated"] = extrapolate(result[KINDS[0]], rate)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
