"""Does GRPO teach the bundled model to search, and does it stay stable for three times as many steps?

Each seed runs the warm start of `make search` and then its GRPO for 54 steps instead of 18, with BM25 and the
default guards. The learning rate is constant, so the first 18 steps are those of `make search`. Before GRPO
and after every 18 steps, the model answers held-out questions (greedy decoding). Scores are F1 and the share
of answers that a retrieved passage supports. Finished seeds are skipped. A seed takes half an hour on two CPU
cores.

    python benchmarks/search_learning.py
"""

import json
from pathlib import Path
from statistics import fmean

import seeds

from rlkit.evaluation import Evaluation

RESULT = Path(__file__).parent / "results" / "search_learning.json"
FOLDER = Path("runs/search_learning")
STEPS = 54
EVALUATION_STEPS = 18  # the steps of `make search`
REWARDS = ("backed", "searches")
TRENDS = ("reward", "entropy", "frac_reward_zero_std")
TREND_STEPS = 9


def run_seed(seed: int, folder: Path) -> None:
    """Run the warm start and GRPO, unless the runs exist."""
    steps = ("--max_steps", str(STEPS), "--evaluation_steps", str(EVALUATION_STEPS))
    seeds.run_seed("search", seed, folder, *steps)


def training(run: Path) -> dict:
    """Return what the guards reported, and means of training metrics over each `TREND_STEPS` steps."""
    lines = seeds.metrics(run)
    steps = [line for line in lines if "reward" in line]
    windows = [steps[i : i + TREND_STEPS] for i in range(0, STEPS, TREND_STEPS)]
    return {
        "guards": [str(value) for line in lines for key, value in line.items() if key.startswith("guards/")],
        **{name: [fmean(line[name] for line in window) for window in windows] for name in TRENDS},
    }


def main() -> None:
    options = seeds.parser(__doc__, FOLDER).parse_args()
    for seed in options.seeds:
        run_seed(seed, options.folder)
    runs = [options.folder / f"seed-{seed}" for seed in options.seeds]
    names = {step: f"step-{step}" for step in range(EVALUATION_STEPS, STEPS, EVALUATION_STEPS)}
    names |= {STEPS: "after"}
    evaluations = [
        {str(step): Evaluation.load(run / "evaluation" / f"{name}.json") for step, name in names.items()}
        for run in runs
    ]
    result = {
        "config": seeds.config_of(runs[0]),
        "training": {seed: training(run) for seed, run in zip(options.seeds, runs, strict=True)},
        "p_all_seeds": seeds.pooled_p_values_of_pairs(evaluations),
    }
    for step, name in names.items():
        comparison = seeds.collect(options.seeds, options.folder, rewards=REWARDS, after=name)
        del comparison["config"]
        result[f"step_{step}"] = comparison
        print(f"{step} steps")
        seeds.report(comparison)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
