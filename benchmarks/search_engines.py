"""Does training on a simulated search engine carry over to a real one, and does its noise curriculum help?

For each seed, three policies start from the same warm start and are trained for 18 steps, with the same
number of rollouts and at most two searches in each: on BM25 (the first 18 steps of `search_learning.py`,
which this script runs if needed), on a simulated engine whose noise rises from 0 to 0.5 (ZeroSearch's
curriculum), and on the same engine with a constant noise of 0.5, the release's default. The constant noise is
also more noise in total, so the last comparison does not isolate its order. All are evaluated on held-out
questions with BM25 (greedy decoding). The simulator is trained once, on the searches in all 54 steps of the
first seed's BM25 run. Finished runs are skipped.

    python benchmarks/search_engines.py
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import search_learning
import seeds

from rlkit.evaluation import Evaluation, compare
from rlkit.runs.record import RolloutFiles

RESULT = Path(__file__).parent / "results" / "search_engines.json"
SCRIPT = Path(__file__).parent.parent / "scripts" / "build_simulator_data.py"
STEPS = search_learning.EVALUATION_STEPS
NOISE = {"curriculum": None, "constant": {"schedule": "constant", "start": 0.5}}
NAMES = ("bm25", *NOISE)
PAIRS = list(itertools.combinations(("start", *NAMES), 2))


def train_simulator(run: Path, folder: Path) -> Path:
    """Train a simulator on the searches of a run, unless it exists; return the folder of its model."""
    model, data = folder / "simulator" / "model", folder / "simulator.jsonl"
    if not model.exists():
        subprocess.run([sys.executable, str(SCRIPT), str(run), "-o", str(data)], check=True)
        config = seeds.CONFIGS / "search" / "simulator.yaml"
        seeds.launch("sft", config, 0, model.parent, "--environment_args.data", str(data))
    return model


def train_simulated(output: Path, seed: int, noise: dict | None, start: Path, simulator: Path) -> None:
    """Train a policy on the simulated engine, unless it exists."""
    if (output / "evaluation" / "after.json").exists():
        return
    options = ["--model_name_or_path", str(start), "--max_steps", str(STEPS)]
    options += ["--environment_args.engine_args.model", str(simulator)]
    if noise is not None:
        options += ["--environment_args.noise", json.dumps(noise)]
    seeds.launch("train", seeds.CONFIGS / "search" / "smollm2_simulated.yaml", seed, output, *options)


def searches(run: Path) -> int:
    """Return the number of searches in all training rollouts, as counted by the reward `searches`."""
    files = RolloutFiles(run)
    steps = [step for step in files.files if step <= STEPS]
    rows = (row for step in steps for row in files.read(step, ["rewards/searches"]))
    return round(sum(row["rewards/searches"] or 0 for row in rows))


def load(run: Path, name: str) -> Evaluation:
    """Return an evaluation without its environment arguments.

    They differ only in the engine of the training split. All evaluations use the same questions and BM25.
    """
    evaluation = Evaluation.load(run / "evaluation" / f"{name}.json")
    return dataclasses.replace(evaluation, environment_args={})


def runs_of(seed: int, bm25: Path, folder: Path) -> dict[str, Path]:
    """Return the run directories of a seed by the engine of its training split."""
    return {"bm25": bm25 / f"seed-{seed}"} | {name: folder / f"{name}-{seed}" for name in NOISE}


def results(runs: Mapping[str, Path]) -> dict[str, Evaluation]:
    """Return the evaluations of a seed: of the warm start and of the three policies."""
    evaluations = {"start": load(runs["bm25"], "before"), "bm25": load(runs["bm25"], f"step-{STEPS}")}
    return evaluations | {name: load(runs[name], "after") for name in NOISE}


def row(seed: int, runs: Mapping[str, Path]) -> dict:
    """Return the paired comparisons of a seed, and the cost of its policies."""
    evaluations = results(runs)
    return {
        "seed": seed,
        "minutes": {name: round(seeds.seconds(run, STEPS) / 60, 1) for name, run in runs.items()},
        "searches": {name: searches(run) for name, run in runs.items()},
        **{f"{b}_against_{a}": compare(evaluations[a], evaluations[b]) for a, b in PAIRS},
    }


def main() -> None:
    parser = seeds.parser(__doc__, Path("runs/search_engines"))
    parser.add_argument(
        "--bm25",
        type=Path,
        default=search_learning.FOLDER,
        help="folder of the runs of search_learning.py (default: %(default)s)",
    )
    options = parser.parse_args()
    for seed in options.seeds:
        search_learning.run_seed(seed, options.bm25)
    runs_by_seed = {seed: runs_of(seed, options.bm25, options.folder) for seed in options.seeds}
    first_runs = runs_by_seed[options.seeds[0]]
    simulator = train_simulator(first_runs["bm25"], options.folder)
    for seed, runs in runs_by_seed.items():
        start = options.bm25 / f"seed-{seed}-warm-start" / "model"
        for name, noise in NOISE.items():
            train_simulated(runs[name], seed, noise, start, simulator)
    rows = [row(seed, runs) for seed, runs in runs_by_seed.items()]
    result = {
        "configs": {name: seeds.config_of(run) for name, run in first_runs.items()},
        "seeds": rows,
        "p_all_seeds": seeds.pooled_p_values_of_pairs([results(runs) for runs in runs_by_seed.values()]),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for entry in rows:
        after = {name: entry[f"{name}_against_start"]["after"] for name in NAMES}
        before = entry["bm25_against_start"]["before"]
        print(f"seed {entry['seed']}: {before:.1%} -> {after}, searches {entry['searches']}")
    print(result["p_all_seeds"])


if __name__ == "__main__":
    main()
