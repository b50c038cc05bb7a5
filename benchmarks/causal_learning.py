"""Does GRPO teach the bundled model causal queries? The recipe of `make train`, with three seeds.

Each seed runs the warm start and then GRPO, and answers its held-out graphs greedily before and after GRPO. A
seed that has been run is not run again. About a quarter of an hour a seed on two CPU cores.

    python benchmarks/causal_learning.py
"""

import argparse
import json
import subprocess
from pathlib import Path

import yaml

from rlkit.evaluation import Evaluation, compare, paired_permutation_test

RESULT = Path(__file__).parent / "results" / "causal_learning.json"
CONFIGS = Path(__file__).parent.parent / "configs" / "causal"


def run_seed(seed: int, folder: Path) -> None:
    start, policy = folder / f"seed-{seed}-warm-start", folder / f"seed-{seed}"
    if not (start / "model").exists():
        launch("sft", "smollm2_warm_start.yaml", seed, start)
    if not (policy / "evaluation" / "after.json").exists():
        launch("train", "smollm2.yaml", seed, policy, "--model_name_or_path", str(start / "model"))


def launch(command: str, config: str, seed: int, output: Path, *more: str) -> None:
    options = ["--seed", str(seed), "--output_dir", str(output), "--overwrite", *more]
    subprocess.run(["rlkit", command, "--config", str(CONFIGS / config), *options], check=True)


def seconds(run: Path) -> float:
    """Wall-clock seconds of a run up to its last metric."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]


def collect(seeds: list[int], folder: Path) -> dict:
    rows, before, after = [], [], []
    for seed in seeds:
        pair = [
            Evaluation.load(folder / f"seed-{seed}" / "evaluation" / f"{n}.json") for n in ("before", "after")
        ]
        result = compare(*pair)
        minutes = (seconds(folder / f"seed-{seed}-warm-start") + seconds(folder / f"seed-{seed}")) / 60
        rows.append(
            {"seed": seed, "minutes": round(minutes, 1), "parsed": [e.rewards["parsed"] for e in pair]}
            | result
        )
        for task in pair[0].scores.keys() & pair[1].scores.keys():
            before.append(sum(pair[0].scores[task]) / len(pair[0].scores[task]))
            after.append(sum(pair[1].scores[task]) / len(pair[1].scores[task]))
    return {
        "config": yaml.safe_load((CONFIGS / "smollm2.yaml").read_text()),
        "seeds": rows,
        "mean_difference": sum(row["difference"] for row in rows) / len(rows),
        "p_all_seeds": paired_permutation_test(before, after),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/causal_learning"))
    options = parser.parse_args()
    for seed in options.seeds:
        run_seed(seed, options.folder)
    result = collect(options.seeds, options.folder)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["seeds"]:
        print(
            f"seed {row['seed']}: {row['before']:.1%} -> {row['after']:.1%}, p = {row['p']:.2g}, "
            f"{row['minutes']} min"
        )


if __name__ == "__main__":
    main()
