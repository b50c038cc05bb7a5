"""Does training on a simulated search engine carry over to a real one, and does its noise curriculum help?

For each seed, three policies start from the same warm start and are trained for the same number of steps,
with the same number of rollouts and at most two searches in each: on BM25, on a simulated engine whose noise
rises from 0 to 0.5 (ZeroSearch's curriculum), and on the same engine with a constant noise of 0.5, the
release's default. The constant noise is also more noise in total, so the last comparison does not isolate its
order. All are evaluated on held-out questions with BM25 (greedy decoding). The simulator is trained once, on
the searches of the first seed's BM25 run. Finished runs are skipped.

    python benchmarks/search_engines.py
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import seeds

from rlkit.evaluation import Evaluation, compare
from rlkit.evaluation.statistics import holm_correction
from rlkit.runs.record import RolloutFiles

RESULT = Path(__file__).parent / "results" / "search_engines.json"
SCRIPT = Path(__file__).parent.parent / "scripts" / "build_simulator_data.py"
STEPS = ("--max_steps", "12")
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


def train_simulated(seed: int, name: str, simulator: Path, folder: Path) -> None:
    """Train a policy on the simulated engine, unless it exists."""
    output = policy(seed, name, folder)
    if (output / "evaluation" / "after.json").exists():
        return
    options = ["--model_name_or_path", str(folder / f"seed-{seed}-warm-start" / "model"), *STEPS]
    options += ["--environment_args.engine_args.model", str(simulator)]
    if NOISE[name] is not None:
        options += ["--environment_args.noise", json.dumps(NOISE[name])]
    seeds.launch("train", seeds.CONFIGS / "search" / "smollm2_simulated.yaml", seed, output, *options)


def policy(seed: int, name: str, folder: Path) -> Path:
    """Return the run directory of a policy."""
    return folder / (f"seed-{seed}" if name == "bm25" else f"seed-{seed}-{name}")


def searches(run: Path) -> int:
    """Return the number of searches in all training rollouts, as counted by the reward `searches`."""
    files = RolloutFiles(run)
    rows = (row for step in files.files for row in files.read(step, ["rewards/searches"]))
    return round(sum(row["rewards/searches"] or 0 for row in rows))


def load(run: Path, name: str) -> Evaluation:
    """Return an evaluation without its environment arguments.

    They differ only in the engine of the training split. All evaluations use the same questions and BM25.
    """
    evaluation = Evaluation.load(run / "evaluation" / f"{name}.json")
    return dataclasses.replace(evaluation, environment_args={})


def results(seed: int, folder: Path) -> dict[str, Evaluation]:
    """Return the evaluations of a seed: of the warm start and of the three policies."""
    start = {"start": load(policy(seed, "bm25", folder), "before")}
    return start | {name: load(policy(seed, name, folder), "after") for name in NAMES}


def row(seed: int, folder: Path) -> dict:
    """Return the paired comparisons of a seed, and the cost of its policies."""
    evaluations = results(seed, folder)
    runs = {name: policy(seed, name, folder) for name in NAMES}
    return {
        "seed": seed,
        "minutes": {name: round(seeds.seconds(run) / 60, 1) for name, run in runs.items()},
        "searches": {name: searches(run) for name, run in runs.items()},
        **{f"{b}_against_{a}": compare(evaluations[a], evaluations[b]) for a, b in PAIRS},
    }


def pooled(numbers: Sequence[int], folder: Path) -> dict[str, float]:
    """Return the p values over the tasks of all seeds, corrected by Holm."""
    evaluations = [results(seed, folder) for seed in numbers]
    p_values = [seeds.pooled_p_value([(e[a], e[b]) for e in evaluations], None) for a, b in PAIRS]
    names = [f"{b}_against_{a}" for a, b in PAIRS]
    return dict(zip(names, holm_correction(p_values), strict=True))


def main() -> None:
    options = seeds.parser(__doc__, Path("runs/search_engines")).parse_args()
    for seed in options.seeds:
        seeds.run_seed("search", seed, options.folder, *STEPS)
        simulator = train_simulator(policy(options.seeds[0], "bm25", options.folder), options.folder)
        for name in NOISE:
            train_simulated(seed, name, simulator, options.folder)
    rows = [row(seed, options.folder) for seed in options.seeds]
    result = {
        "configs": {name: seeds.config_of(policy(options.seeds[0], name, options.folder)) for name in NAMES},
        "seeds": rows,
        "p_all_seeds": pooled(options.seeds, options.folder),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for entry in rows:
        after = {name: entry[f"{name}_against_start"]["after"] for name in NAMES}
        before = entry["bm25_against_start"]["before"]
        print(f"seed {entry['seed']}: {before:.1%} -> {after}, searches {entry['searches']}")
    print(result["p_all_seeds"])


if __name__ == "__main__":
    main()
