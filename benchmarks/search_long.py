"""Does GRPO on search stay stable for three times as many steps as in `make search`, with the default guards?

Each seed runs the warm start and then GRPO. It is evaluated on held-out questions (greedy decoding) before,
during and after GRPO. Finished seeds are skipped.

    python benchmarks/search_long.py
"""

import json
from pathlib import Path

import seeds

RESULT = Path(__file__).parent / "results" / "search_long.json"
# `make search` has 18 steps.
OPTIONS = ("--max_steps", "54", "--evaluation_steps", "18")


def curve(run: Path) -> dict:
    """Return the held-out results by step, and what the guards reported."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "held_out": {line["step"]: line["evaluation/f1"] for line in lines if "evaluation/f1" in line},
        "guards": [value for line in lines for key, value in line.items() if key.startswith("guards/")],
    }


def main() -> None:
    options = seeds.parser(__doc__, Path("runs/search_long")).parse_args()
    for seed in options.seeds:
        seeds.run_seed("search", seed, options.folder, *OPTIONS)
    result = seeds.collect(options.seeds, options.folder, rewards=["backed", "searches"])
    for row in result["seeds"]:
        row.update(curve(options.folder / f"seed-{row['seed']}"))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    seeds.report(result)


if __name__ == "__main__":
    main()
