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

import seeds

RESULT = Path(__file__).parent / "results" / "search_learning.json"
FOLDER = Path("runs/search_learning")
STEPS = 54
EVALUATION_STEPS = 18  # the steps of `make search`
REWARDS = ("backed", "searches")


def run_seed(seed: int, folder: Path) -> None:
    """Run the warm start and GRPO, unless the runs exist."""
    steps = ("--max_steps", str(STEPS), "--evaluation_steps", str(EVALUATION_STEPS))
    seeds.run_seed("search", seed, folder, *steps)


def guards(run: Path) -> list[str]:
    """Return what the guards reported."""
    lines = seeds.metrics(run)
    return [str(value) for line in lines for key, value in line.items() if key.startswith("guards/")]


def main() -> None:
    options = seeds.parser(__doc__, FOLDER).parse_args()
    for seed in options.seeds:
        run_seed(seed, options.folder)
    result: dict = {"guards": {seed: guards(options.folder / f"seed-{seed}") for seed in options.seeds}}
    for step in range(EVALUATION_STEPS, STEPS + 1, EVALUATION_STEPS):
        comparison = seeds.collect(
            options.seeds, options.folder, rewards=REWARDS, step=None if step == STEPS else step
        )
        result["config"] = comparison.pop("config")
        result[f"step_{step}"] = comparison
        print(f"{step} steps")
        seeds.report(comparison)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
