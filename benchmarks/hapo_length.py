"""Does HAPO shorten answers at the same accuracy? `make hapo` with three seeds, compared with plain GRPO.

Both start from the same model, train on the same tasks and are evaluated on the same held-out tasks (greedy
decoding). Finished runs are skipped. A seed takes about seven minutes on two CPU cores, after a warm start of
four minutes.

    python benchmarks/hapo_length.py
"""

import argparse
import json
import subprocess
from pathlib import Path

import numpy as np
import yaml

from rlkit.evaluation import Evaluation, compare, paired_permutation_test

RESULT = Path(__file__).parent / "results" / "hapo_length.json"
CONFIGS = Path(__file__).parent.parent / "configs" / "hapo"


def launch(command: str, config: str, output: Path, *extra: str) -> None:
    if not (output / "model").exists():
        options = ["--output_dir", str(output), "--overwrite", *extra]
        subprocess.run(["rlkit", command, "--config", str(CONFIGS / config), *options], check=True)


def run_seed(seed: int, folder: Path) -> None:
    start = folder / "warm-start"
    launch("sft", "smollm2_warm_start.yaml", start)
    options = ["--seed", str(seed), "--model_name_or_path", str(start / "model")]
    launch("train", "smollm2.yaml", folder / f"hapo-{seed}", *options)
    launch("train", "smollm2_grpo.yaml", folder / f"grpo-{seed}", *options)


def lengths(evaluation: Evaluation) -> dict[str, float]:
    return {record["task_id"]: record["length"] for record in evaluation.completions}


def load(run: Path, name: str) -> Evaluation:
    return Evaluation.load(run / "evaluation" / f"{name}.json")


def row(seed: int, folder: Path) -> dict:
    """Return accuracy and mean length before and after training, and paired tests of HAPO against GRPO."""
    hapo, grpo = (folder / f"{name}-{seed}" for name in ("hapo", "grpo"))
    before, after, plain = load(hapo, "before"), load(hapo, "after"), load(grpo, "after")
    pairs = [(lengths(plain)[task], length) for task, length in lengths(after).items()]
    accuracy = compare(plain, after)
    return {
        "seed": seed,
        "tasks": accuracy["n"],
        "accuracy": {"start": before.accuracy.mean, "grpo": plain.accuracy.mean, "hapo": after.accuracy.mean},
        "length": {"start": before.length, "grpo": plain.length, "hapo": after.length},
        "p_accuracy": accuracy["p"],
        "p_length": paired_permutation_test(*map(list, zip(*pairs, strict=True))),
        "minutes": [round(seconds(run) / 60, 1) for run in (hapo, grpo)],
    }


def seconds(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/hapo_length"))
    options = parser.parse_args()
    for seed in options.seeds:
        run_seed(seed, options.folder)
    rows = [row(seed, options.folder) for seed in options.seeds]
    names = ("start", "grpo", "hapo")
    result = {
        "config": yaml.safe_load((CONFIGS / "smollm2.yaml").read_text()),
        "seeds": rows,
        "mean_accuracy": {n: float(np.mean([r["accuracy"][n] for r in rows])) for n in names},
        "mean_length": {n: float(np.mean([r["length"][n] for r in rows])) for n in names},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("mean_accuracy", "mean_length")}))


if __name__ == "__main__":
    main()
