"""Does training on a simulated search engine carry over to a real one, and does its noise curriculum help?

For each seed, three policies start from the same warm start and are trained for the same number of steps,
with the same number of rollouts and at most two searches in each: on BM25, on a simulated engine whose noise
rises from 0 to 0.5 (ZeroSearch's curriculum), and on the same engine with a constant noise of 0.5 (the
baseline of the paper's ablation). All are evaluated on held-out questions with BM25 (greedy decoding). The
simulator is trained once, on the searches of the first seed's BM25 run. Finished runs are skipped.

    python benchmarks/search_engines.py
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import seeds

from rlkit.evaluation import Evaluation, compare

RESULT = Path(__file__).parent / "results" / "search_engines.json"
SCRIPT = Path(__file__).parent.parent / "scripts" / "build_simulator_data.py"
STEPS = ("--max_steps", "12")
NOISE = {"curriculum": None, "constant": {"schedule": "constant", "start": 0.5}}
NAMES = ("bm25", *NOISE)


def train_simulator(run: Path, folder: Path) -> Path:
    """Train a simulator on the searches of a run, unless it exists; return its folder."""
    model, data = folder / "simulator" / "model", folder / "simulator.jsonl"
    if not model.exists():
        subprocess.run([sys.executable, str(SCRIPT), str(run), "-o", str(data)], check=True)
        config = seeds.CONFIGS / "search" / "simulator.yaml"
        seeds.launch("sft", config, 0, model.parent, "--environment_args.data", str(data))
    return model


def train_simulated(seed: int, name: str, simulator: Path, folder: Path) -> None:
    """Train a policy on the simulated engine, unless it exists."""
    output = folder / f"seed-{seed}-{name}"
    if (output / "evaluation" / "after.json").exists():
        return
    options = ["--model_name_or_path", str(folder / f"seed-{seed}-warm-start" / "model"), *STEPS]
    options += ["--environment_args.engine_args.model", str(simulator)]
    if NOISE[name] is not None:
        options += ["--environment_args.noise", json.dumps(NOISE[name])]
    seeds.launch("train", seeds.CONFIGS / "search" / "smollm2_simulated.yaml", seed, output, *options)


def policy(seed: int, name: str, folder: Path) -> Path:
    return folder / (f"seed-{seed}" if name == "bm25" else f"seed-{seed}-{name}")


def searches(run: Path) -> int:
    """Return the number of searches of all training rollouts."""
    files = (run / "rollouts").glob("*.parquet")
    return int(sum(pd.read_parquet(file, columns=["rewards/searches"]).sum().item() for file in files))


def row(seed: int, folder: Path) -> dict:
    """Return the changes of a seed's policies, and the paired comparisons between them."""
    runs = {name: policy(seed, name, folder) for name in NAMES}
    after = {name: Evaluation.load(run / "evaluation" / "after.json") for name, run in runs.items()}
    before = Evaluation.load(runs["bm25"] / "evaluation" / "before.json")
    return {
        "seed": seed,
        "minutes": {name: round(seeds.seconds(run) / 60, 1) for name, run in runs.items()},
        "searches": {name: searches(run) for name, run in runs.items()},
        "against_start": {name: compare(before, evaluation) for name, evaluation in after.items()},
        **{f"{b}_against_{a}": compare(after[a], after[b]) for a, b in itertools.combinations(NAMES, 2)},
    }


def pooled(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the p values over the tasks of all seeds."""
    p_values = {}
    for a, b in itertools.combinations(("start", *NAMES), 2):
        pairs = [
            [
                Evaluation.load(policy(seed, "bm25", folder) / "evaluation" / "before.json")
                if name == "start"
                else Evaluation.load(policy(seed, name, folder) / "evaluation" / "after.json")
                for name in (a, b)
            ]
            for seed in options.seeds
        ]
        p_values[f"{b}_against_{a}"] = seeds.pooled_p_value(pairs, None)
    return p_values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/search_engines"))
    options = parser.parse_args()
    for seed in options.seeds:
        seeds.run_seed("search", seed, options.folder, *STEPS)
        simulator = train_simulator(policy(options.seeds[0], "bm25", options.folder), options.folder)
        for name in NOISE:
            train_simulated(seed, name, simulator, options.folder)
    rows = [row(seed, options.folder) for seed in options.seeds]
    result = {"seeds": rows, "p_all_seeds": pooled(options.folder, options)}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for entry in rows:
        changes = {name: (c["before"], c["after"]) for name, c in entry["against_start"].items()}
        print(f"seed {entry['seed']}: {changes}, searches {entry['searches']}, minutes {entry['minutes']}")
    print(result["p_all_seeds"])


if __name__ == "__main__":
    main()
