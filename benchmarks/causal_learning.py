"""Does GRPO teach the bundled model causal queries? The recipe of `make train`, with three seeds.

Each seed runs the warm start and then GRPO, and is evaluated on held-out graphs (greedy decoding) before and
after GRPO. Finished seeds are skipped. A seed takes about 15 minutes on two CPU cores.

    python benchmarks/causal_learning.py
"""

import json
from pathlib import Path

import seeds

RESULT = Path(__file__).parent / "results" / "causal_learning.json"


def main() -> None:
    options = seeds.parser(__doc__, Path("runs/causal_learning")).parse_args()
    for seed in options.seeds:
        seeds.run_seed("causal", seed, options.folder)
    result = seeds.collect(options.seeds, options.folder, columns=["kind"])
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    seeds.report(result)


if __name__ == "__main__":
    main()
