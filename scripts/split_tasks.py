"""Split an environment's tasks to test interpolation and extrapolation separately.

    python scripts/split_tasks.py rerank-v3 --environment_args.collection data/scifact \\
        --encoder BAAI/bge-small-en-v1.5 -o splits.json
    rlkit train --config FILE --fold splits.json:interpolation-0
    rlkit eval MODEL --environment rerank-v3 --fold splits.json:extrapolation-0

The script embeds the tasks' column `query`, or their prompts if there is no such column, and compares the
vectors; `rlkit/evaluation/splits.py` describes the two methods. It prints the sizes of each fold. If the
tasks list their relevant documents (`judged`), it also prints the fraction of test tasks that share a
relevant document with a training task.
"""

import json
import sys
from typing import Any

import datasets
import numpy as np

from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.commands.run import run_command
from rlkit.errors import UserError
from rlkit.evaluation.splits import METHODS, label_overlap, split_tasks
from rlkit.files import atomic_write
from rlkit.registry import load_environment
from rlkit.retrieval.encoders import load_encoder
from rlkit.runs.record import prompt_text


def embed(tasks: datasets.Dataset, encoder: Any) -> np.ndarray:
    """Embed the queries or prompts of tasks, (tasks, dimensions)."""
    texts = tasks["query"] if "query" in tasks.column_names else map(prompt_text, tasks["prompt"])
    return np.asarray(encoder.encode(list(texts), show_progress_bar=True))


def main() -> int:
    """Write the folds to a file and print their sizes."""
    parser = CommandParser(description="Split tasks into interpolation and extrapolation folds.")
    add = parser.add_argument
    add("environment", help="environment id, package.module:Class or path/file.py:Class")
    parser.add_environment_args("arguments of the environment")
    add("--encoder", required=True, help="sentence-transformers model, or bundled:all-minilm-l6-v2")
    add("--method", choices=METHODS, default="resttest", help="method of splitting (default: resttest)")
    add(
        "-k",
        type=int,
        default=5,
        help="resttest: number of clusters; restrain: number of nearest tasks per test task (default: 5)",
    )
    add(
        "--size",
        type=int,
        default=0,
        help="restrain: maximum number of training tasks in a fold (default: 0, no maximum)",
    )
    add("--seed", type=int, default=0, help="seed of the tasks and of the clustering (default: 0)")
    add("-o", "--out", type=output_file, required=True, help="JSON file to write the folds to")
    options = parser.parse_args(sys.argv[1:])
    environment = load_environment(options.environment, **options.environment_args)
    train, test = (environment.tasks(split, None, options.seed) for split in ("train", "test"))
    encoder = load_encoder(options.encoder)
    try:
        folds = split_tasks(
            embed(train, encoder),
            embed(test, encoder),
            options.method,
            k=options.k,
            size=options.size,
            seed=options.seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    task_ids = {}
    for fold in folds:
        fold_train, fold_test = train.select(fold.train), test.select(fold.test)
        task_ids[fold.name] = {"train": list(fold_train["task_id"]), "test": list(fold_test["task_id"])}
        line = f"{fold.name}: {len(fold_train)} training tasks, {len(fold_test)} test tasks"
        if "judged" in train.column_names:
            train_labels = [set(ids) for ids in fold_train["judged"]]
            test_labels = [set(ids) for ids in fold_test["judged"]]
            overlap = label_overlap(train_labels, test_labels)
            line += f", {overlap:.0%} of them share a relevant document with a training task"
        print(line)
    content = {"environment": environment.id, "method": options.method, "folds": task_ids}
    atomic_write(options.out, json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
