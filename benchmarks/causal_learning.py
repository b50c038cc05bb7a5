"""Does GRPO teach the bundled model causal queries? The recipe of `make train`, with three seeds.

Each seed runs the warm start and then GRPO, and is evaluated on held-out graphs (greedy decoding) before and
after GRPO. Finished seeds are skipped. A seed takes about 20 minutes on two CPU cores.

    python benchmarks/causal_learning.py
"""

import json
from pathlib import Path

import seeds

from rlkit.evaluation import Evaluation

RESULT = Path(__file__).parent / "results" / "causal_learning.json"


def sums(evaluation: Evaluation) -> dict[str, float]:
    """Return the scores of the arithmetic questions that are answered with a sum, by task."""
    rows = [row for row in evaluation.completions if row["kind"] == "arithmetic" and "+" in row["completion"]]
    return {row["task_id"]: row["score"] for row in rows if row["score"] is not None}


def compare_sums(before: Evaluation, after: Evaluation) -> dict[str, float | None]:
    """Return the shares of arithmetic questions answered with a sum, and accuracies of those answers.

    The accuracies `both_before` and `both_after` are over the questions answered with a sum both times.
    """
    first, second = sums(before), sums(after)
    both = first.keys() & second.keys()
    scores = {
        "before": list(first.values()),
        "after": list(second.values()),
        "both_before": [first[task] for task in both],
        "both_after": [second[task] for task in both],
    }
    n = before.breakdown["kind"]["arithmetic"].n
    return {
        "share_before": len(first) / n,
        "share_after": len(second) / n,
        "both": len(both),
        **{f"accuracy_{name}": sum(s) / len(s) if s else None for name, s in scores.items()},
    }


def main() -> None:
    options = seeds.parser(__doc__, Path("runs/causal_learning")).parse_args()
    for seed in options.seeds:
        seeds.run_seed("causal", seed, options.folder)
    result = seeds.collect(options.seeds, options.folder, columns=["kind"])
    result["warm_start"] = seeds.config_of(options.folder / f"seed-{options.seeds[0]}-warm-start")
    for row in result["seeds"]:
        run = options.folder / f"seed-{row['seed']}" / "evaluation"
        pair = [Evaluation.load(run / f"{name}.json") for name in ("before", "after")]
        row["sums"] = compare_sums(*pair)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    seeds.report(result)


if __name__ == "__main__":
    main()
