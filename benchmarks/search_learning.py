"""Does GRPO teach the bundled model to search? The recipe of `make search`, with three seeds.

Each seed runs the warm start and then GRPO with a real engine. It is evaluated on held-out questions (greedy
decoding) before and after GRPO: by F1, and by the share of answers that a retrieved passage supports.
Finished seeds are skipped. A seed takes about 15 minutes on two CPU cores.

    python benchmarks/search_learning.py
"""

import json
from pathlib import Path

import seeds

RESULT = Path(__file__).parent / "results" / "search_learning.json"


def main() -> None:
    options = seeds.parser(__doc__, Path("runs/search_learning")).parse_args()
    for seed in options.seeds:
        seeds.run_seed("search", seed, options.folder)
    result = seeds.collect(options.seeds, options.folder, rewards=["backed", "searches"])
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    seeds.report(result)


if __name__ == "__main__":
    main()
