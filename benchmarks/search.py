"""How fast searching is: BM25 in process, our server under load, a simulated engine, a turn of training.

Parts can be run alone; results of others stay in the JSON. The server takes two minutes, a turn three, the
others one each.

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
from rlkit.retrieval.engines.open import world_index

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "search.json"
WORLD = World(0, 100_000)
PORT = 8123


class Timed(SearchEnvironment):
    """search-v2 that writes down how long it takes to answer a batch of turns."""

    def respond(self, turns):
        start = time.perf_counter()
        replies = super().respond(turns)
        with open(os.environ["RLKIT_TIMES"], "a") as file:
            file.write(f"{time.perf_counter() - start}\n")
        return replies


def queries(n: int) -> list[str]:
    """What a policy that knows how would search for."""
    found: list[str] = []
    for i in range(n):
        found += [step.query for step in WORLD.question("train", i, (1, 2)).steps]
    return found[:n]


def bm25(options: argparse.Namespace) -> dict:
    """Queries a second in process."""
    engine = open_index(world_index(WORLD, "bm25"))
    asked = [Query(text) for text in queries(8000)]
    engine.search(asked[:500], 3)
    rates = {}
    for size in (64, 500):
        start = time.perf_counter()
        for i in range(0, len(asked), size):
            engine.search(asked[i : i + size], 3)
        rates[f"batches of {size}"] = round(len(asked) / (time.perf_counter() - start))
    return {"passages": WORLD.size, "queries_per_second": rates, "target": 1000}


def server(options: argparse.Namespace) -> dict:
    """Many clients with one query a request, each sending the next when it has an answer."""
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
    """Requests a second, what failed, and the server's memory at the start, in the middle and at the end."""
    asked, took, errors = queries(2000), [], []
    memory = [psutil.Process(pid).memory_info().rss]
    end = time.perf_counter() + seconds

    async def one(i: int) -> None:
        while time.perf_counter() < end:
            body = {"queries": [asked[i % len(asked)]], "topk": 3, "return_scores": True}
            start = time.perf_counter()
            reply = await client.post(f"{url}/retrieve", json=body)
            took.append(time.perf_counter() - start)
            if reply.status_code != 200 or not reply.json()["result"][0]:
                errors.append(reply.text)
            i += clients

    async def watch() -> None:
        for _ in range(2):
            await asyncio.sleep(seconds / 2)
            memory.append(psutil.Process(pid).memory_info().rss)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(trust_env=False, timeout=60, limits=limits) as client:
        await asyncio.gather(watch(), *(one(i) for i in range(clients)))
    p50, p99 = np.percentile(took, [50, 99])
    return {
        "seconds": seconds,
        "requests_per_second": round(len(took) / seconds),
        "errors": len(errors),
        "p50_ms": round(1000 * p50, 1),
        "p99_ms": round(1000 * p99, 1),
        "server_megabytes": [round(size / 1e6) for size in memory],
    }


def simulated(options: argparse.Namespace) -> dict:
    """Documents a second of a simulated engine, through vLLM and through transformers."""
    rates = {}
    for through in ("vllm", "transformers"):
        command = [sys.executable, __file__, "--write", through, "--simulator", options.simulator]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        rates[through] = json.loads(done.stdout.splitlines()[-1])
    return {"model": "configs/search/simulator.yaml", **rates}


def write(model: str, through: str) -> dict:
    """128 documents, one for a query; each way of writing in a process of its own."""
    engine = open_simulated(model, through, tokens=120)
    asked = [Query(f"founder of number {i}", f"Who founded number {i}?", ("A",), (i,)) for i in range(136)]
    engine.search(asked[:8], 1)
    start = time.perf_counter()
    found = engine.search(asked[8:], 1)
    seconds = time.perf_counter() - start
    documents = sum(len(one.documents) for one in found)
    return {"asked": 128, "documents": documents, "documents_per_second": round(documents / seconds, 1)}


def turn(options: argparse.Namespace) -> dict:
    """The share of a GRPO step, 8 questions x 8 rollouts of 3 turns, that searching takes."""
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
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load on the server, twice")
    parser.add_argument("--policy", default="runs/search_warm_start/model", help="that searches")
    parser.add_argument("--simulator", default="runs/simulator/model", help="that plays the engine")
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
