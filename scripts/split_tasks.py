"""Split an environment's tasks so that interpolation and extrapolation are tested apart.

    python scripts/split_tasks.py rerank-v1 --environment_args.collection data/scifact \\
        --encoder BAAI/bge-small-en-v1.5 -o splits.json
    rlkit train --config FILE --fold splits.json:interpolation-0
    rlkit eval MODEL --environment rerank-v1 --fold splits.json:extrapolation-0

The prompts of the tasks (or their column `query`, where they have one) are embedded and compared; see
`rlkit/evaluation/splits.py` for the two methods. For each fold the sizes are printed, and, where tasks say
which documents are relevant (`judged`), the share of test tasks that share one with a training task.
"""

import json
import sys
from typing import Any

import datasets
import numpy as np

from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.commands.run import run_command
from rlkit.errors import UserError
from rlkit.evaluation.splits import METHODS, label_overlap, split_queries
from rlkit.files import atomic_write
from rlkit.registry import load_environment
from rlkit.retrieval.encoders import load_encoder
from rlkit.runs.record import prompt_text


def embed(tasks: datasets.Dataset, encoder: Any) -> np.ndarray:
    """Vectors of tasks, one row each."""
    texts = tasks["query"] if "query" in tasks.column_names else map(prompt_text, tasks["prompt"])
    return np.asarray(encoder.encode(list(texts), show_progress_bar=True))


def main() -> int:
    """Write the file of folds and print their sizes."""
    parser = CommandParser(description="Split tasks into interpolation and extrapolation.")
    add = parser.add_argument
    add("environment", help="an id, package.module:Class or path/file.py:Class")
    parser.add_environment_args("its arguments")
    add("--encoder", required=True, help="a model of sentence-transformers, or bundled:all-minilm-l6-v2")
    add("--method", choices=METHODS, default="resttest", help="(default: resttest)")
    add("-k", type=int, default=5, help="clusters, or nearest tasks of each test task (default: 5)")
    add("--size", type=int, default=0, help="of restrain: training tasks of a fold at most")
    add("--seed", type=int, default=0, help="of the tasks and the clusters (default: 0)")
    add("-o", "--out", type=output_file, required=True, help="the file of folds")
    options = parser.parse_args(sys.argv[1:])
    environment = load_environment(options.environment, **options.environment_args)
    train, test = (environment.tasks(split, None, options.seed) for split in ("train", "test"))
    encoder = load_encoder(options.encoder)
    try:
        found = split_queries(
            embed(train, encoder),
            embed(test, encoder),
            options.method,
            k=options.k,
            size=options.size,
            seed=options.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    folds = {}
    for fold in found:
        parts = {"train": train.select(fold.train), "test": test.select(fold.test)}
        folds[fold.name] = {split: list(rows["task_id"]) for split, rows in parts.items()}
        line = f"{fold.name}: {len(fold.train)} to train on, {len(fold.test)} to test on"
        if "judged" in train.column_names:
            labels = {split: [set(one) for one in rows["judged"]] for split, rows in parts.items()}
            line += f", {label_overlap(labels['train'], labels['test']):.0%} with a relevant document known"
        print(line)
    said = {"environment": environment.id, "method": options.method, "folds": folds}
    atomic_write(options.out, json.dumps(said, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
