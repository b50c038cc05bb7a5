"""Does GRPO teach the bundled model to search? The recipe of `make search`, with three seeds.

Each seed runs the warm start and then GRPO with a real engine, and answers its held-out questions greedily
before and after GRPO: F1, and the share of answers that a passage it found backs. A seed that has been run is
not run again. About a quarter of an hour a seed on two CPU cores.

    python benchmarks/search_learning.py
"""

import argparse
import json
from pathlib import Path

import seeds

RESULT = Path(__file__).parent / "results" / "search_learning.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/search_learning"))
    options = parser.parse_args()
    for seed in options.seeds:
        seeds.run_seed("search", seed, options.folder)
    result = seeds.collect("search", options.seeds, options.folder, others=["backed", "searches"])
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    seeds.report(result)


if __name__ == "__main__":
    main()
