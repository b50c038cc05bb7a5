"""Speed of searching: BM25 in process, the search server under load, a simulated engine, a GRPO step.

Parts can be run separately; the results of the other parts stay in the JSON file. The server takes two
minutes, the GRPO step three, and the other parts one minute each.

    python benchmarks/search.py
    python benchmarks/search.py --part server --seconds 60
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import psutil

from rlkit.envs.search import SearchEnvironment
from rlkit.envs.search.simulated import open_simulated
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import Query
from rlkit.retrieval.engines.index import open_index
from rlkit.retrieval.engines.open import cached_world_index

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "search.json"
WORLD = World(0, 100_000)
PORT = 8123


class Timed(SearchEnvironment):
    """search-v3 that logs the seconds it takes to reply to a batch of turns."""

    def respond(self, turns):
        start = time.perf_counter()
        replies = super().respond(turns)
        with open(os.environ["RLKIT_TIMES"], "a") as file:
            file.write(f"{time.perf_counter() - start}\n")
        return replies


def queries(n: int) -> list[str]:
    """Return `n` queries of reference solutions."""
    texts: list[str] = []
    for i in range(n):
        texts += [step.query for step in WORLD.question("train", i, (1, 2)).steps]
    return texts[:n]


def bm25(options: argparse.Namespace) -> dict:
    """Return the queries per second of BM25 in process."""
    engine = open_index(cached_world_index(WORLD, "bm25"))
    batch = [Query(text) for text in queries(8000)]
    engine.search(batch[:500], 3)  # warm-up
    rates = {}
    for size in (64, 500):
        start = time.perf_counter()
        for i in range(0, len(batch), size):
            engine.search(batch[i : i + size], 3)
        rates[f"batches of {size}"] = round(len(batch) / (time.perf_counter() - start))
    return {"passages": WORLD.size, "queries_per_second": rates, "target": 1000}


def server(options: argparse.Namespace) -> dict:
    """Measure the search server under a closed-loop load with one query per request."""
    command = [sys.executable, "-m", "rlkit", "serve-search", f"world:{WORLD.size}:{WORLD.seed}"]
    process = subprocess.Popen([*command, "--port", str(PORT)], cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{PORT}"
        while not _healthy(url):
            time.sleep(0.5)
        return {f"{n} clients": asyncio.run(load(url, n, options.seconds, process.pid)) for n in (64, 256)}
    finally:
        process.terminate()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).is_success
    except httpx.TransportError:
        return False


async def load(url: str, clients: int, seconds: float, pid: int) -> dict:
    """Return requests per second, errors, latencies, and the server's memory at start, midpoint and end.

    Each client sends its next request when it has received a response (closed-loop load).
    """
    texts, latencies, errors = queries(2000), [], []
    memory = [psutil.Process(pid).memory_info().rss]
    end = time.perf_counter() + seconds

    async def run_client(i: int) -> None:
        while time.perf_counter() < end:
            body = {"queries": [texts[i % len(texts)]], "topk": 3, "return_scores": True}
            start = time.perf_counter()
            response = await client.post(f"{url}/retrieve", json=body)
            latencies.append(time.perf_counter() - start)
            if response.status_code != 200 or not response.json()["result"][0]:
                errors.append(response.text)
            i += clients

    async def watch_memory() -> None:
        for _ in range(2):
            await asyncio.sleep(seconds / 2)
            memory.append(psutil.Process(pid).memory_info().rss)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(trust_env=False, timeout=60, limits=limits) as client:
        await asyncio.gather(watch_memory(), *(run_client(i) for i in range(clients)))
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "seconds": seconds,
        "requests_per_second": round(len(latencies) / seconds),
        "errors": len(errors),
        "p50_ms": round(1000 * p50, 1),
        "p99_ms": round(1000 * p99, 1),
        "server_megabytes": [round(size / 1e6) for size in memory],
    }


def simulated(options: argparse.Namespace) -> dict:
    """Return the documents per second of a simulated engine, with vLLM and with transformers."""
    rates = {}
    for backend in ("vllm", "transformers"):
        # In separate processes, so that one backend cannot slow down the other.
        command = [sys.executable, __file__, "--write", backend, "--simulator", options.simulator]
        process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        rates[backend] = json.loads(process.stdout.splitlines()[-1])
    return {"model": "configs/search/simulator.yaml", **rates}


def write(model: str, backend: str) -> dict:
    """Generate one document for each of 128 queries and return the rate."""
    engine = open_simulated(model, backend, tokens=120)
    batch = [Query(f"founder of number {i}", f"Who founded number {i}?", ("A",), (i,)) for i in range(136)]
    engine.search(batch[:8], 1)  # warm-up
    start = time.perf_counter()
    results = engine.search(batch[8:], 1)
    seconds = time.perf_counter() - start
    documents = sum(len(result.documents) for result in results)
    return {"asked": 128, "documents": documents, "documents_per_second": round(documents / seconds, 1)}


def turn(options: argparse.Namespace) -> dict:
    """Return the share of a GRPO step (8 questions, 8 rollouts each, 3 turns) that is spent searching."""
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times"
        command = [
            sys.executable,
            "-m",
            "rlkit",
            "train",
            "--config",
            str(ROOT / "configs/search/smollm2.yaml"),
        ]
        command += ["--environment", f"{__file__}:Timed", "--model_name_or_path", options.policy]
        command += ["--num_generations", "8", "--gradient_accumulation_steps", "8", "--max_steps", "3"]
        command += ["--evaluation_tasks", "0", "--save_strategy", "no", "--output_dir", f"{folder}/run"]
        subprocess.run(command, check=True, env=os.environ | {"RLKIT_TIMES": str(times)})
        rows = [
            json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        steps = [row["step_time"] for row in rows if "step_time" in row]
        searching = [float(line) for line in times.read_text().split()]
    share = sum(searching) / sum(steps)
    return {
        "step_seconds": round(float(np.mean(steps)), 2),
        "search_seconds_a_step": round(sum(searching) / len(steps), 4),
        "share_of_the_step": round(share, 5),
    }


PARTS = {"bm25": bm25, "server": server, "simulated": simulated, "turn": turn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    add = parser.add_argument
    add("--part", choices=PARTS, action="append", help="part to run; can be repeated (default: all)")
    add("--seconds", type=float, default=60.0, help="duration of each of the two server loads (default: 60)")
    add("--policy", default="runs/search_warm_start/model", help="model that searches")
    add("--simulator", default="runs/simulator/model", help="model that simulates the engine")
    options = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if options.write:
        print(json.dumps(write(options.simulator, options.write)))
        return
    for name in options.part or PARTS:
        result[name] = PARTS[name](options)
        print(name, json.dumps(result[name], indent=1))
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
