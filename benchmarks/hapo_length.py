"""Does HAPO shorten answers at the same accuracy? Three tasks, three seeds each, compared with plain GRPO.

Both start from the same model, train on the same tasks and are evaluated on the same held-out tasks (greedy
decoding). The warm start imitates more long than short right solutions, so that answers can become shorter.
Finished runs are skipped.

    python benchmarks/hapo_length.py --task math      # `make hapo`
    python benchmarks/hapo_length.py --task causal    # interventions that need arithmetic
    python benchmarks/hapo_length.py --task search    # questions of two hops, with BM25
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import seeds

from rlkit.evaluation import Evaluation, compare, paired_permutation_test

RESULT = Path(__file__).parent / "results" / "hapo_length.json"


@dataclass(frozen=True)
class Task:
    """What differs from `make hapo`.

    Attributes:
        warm_start: Config of the warm start.
        warm_start_options: Options of `rlkit sft`.
        options: Options of both runs of `rlkit train`.
    """

    warm_start: str
    warm_start_options: Sequence[str] = ()
    options: Sequence[str] = ()


def flags(**values: object) -> list[str]:
    """Return values as command-line options: `["--max_steps", "16"]`."""
    return [
        part
        for key, value in values.items()
        for part in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


CAUSAL = {
    "level": "intervention",
    "num_nodes": 4,
    "max_in_degree": 1,
    "decimals": 1,
    "kinds": "arithmetic",
    "questions_per_graph": 1,
    "prompt_style": "short",
}
SEARCH = {"world_size": 2000, "hops": [2], "topk": 1, "max_searches": 2, "prompt_style": "short"}
TASKS = {
    "math": Task("hapo/smollm2_warm_start.yaml"),
    "causal": Task(
        "causal/smollm2_warm_start.yaml",
        flags(
            environment_args=CAUSAL | {"solution_style": "mixed"},
            demonstrations="solution",
            max_completion_length=256,
        ),
        flags(
            environment="causal-v1",
            environment_args=CAUSAL,
            num_tasks=16,
            evaluation_tasks=300,
            max_completion_length=256,
            max_steps=20,
        ),
    ),
    "search": Task(
        "search/smollm2_warm_start.yaml",
        flags(environment_args=SEARCH | {"solution_style": "mixed"}, max_completion_length=500, max_steps=16),
        flags(
            environment="search-v3",
            environment_args=SEARCH,
            num_tasks=16,
            evaluation_tasks=200,
            max_completion_length=500,
            learning_rate=2e-5,
            max_steps=16,
            max_turn_tokens=64,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
        ),
    ),
}


def launch(command: str, config: str, seed: int, output: Path, *extra: str) -> None:
    """Run a command of rlkit, unless the run exists."""
    if not (output / "model").exists():
        seeds.launch(command, seeds.CONFIGS / config, seed, output, *extra)


def run_seed(task: Task, seed: int, folder: Path) -> None:
    """Run HAPO and GRPO from the warm start, which is the same for all seeds."""
    start = folder / "warm-start"
    launch("sft", task.warm_start, 0, start, *task.warm_start_options)
    options = ["--model_name_or_path", str(start / "model"), *task.options]
    for name, config in (("hapo", "smollm2.yaml"), ("grpo", "smollm2_grpo.yaml")):
        launch("train", f"hapo/{config}", seed, folder / f"{name}-{seed}", *options)


def lengths(evaluation: Evaluation) -> dict[str, float]:
    return {record["task_id"]: record["length"] for record in evaluation.completions}


def load(run: Path, name: str) -> Evaluation:
    return Evaluation.load(run / "evaluation" / f"{name}.json")


def paired_lengths(grpo: Evaluation, hapo: Evaluation) -> tuple[list[float], list[float]]:
    """Return the lengths of both models' answers to the same tasks."""
    first, second = lengths(grpo), lengths(hapo)
    return list(first.values()), [second[task] for task in first]


def row(seed: int, folder: Path) -> dict:
    """Return accuracy and mean length before and after training, and paired tests of HAPO against GRPO."""
    hapo, grpo = (folder / f"{name}-{seed}" for name in ("hapo", "grpo"))
    before, after, plain = load(hapo, "before"), load(hapo, "after"), load(grpo, "after")
    accuracy = compare(plain, after)
    return {
        "seed": seed,
        "tasks": accuracy["n"],
        "accuracy": {"start": before.accuracy.mean, "grpo": plain.accuracy.mean, "hapo": after.accuracy.mean},
        "length": {"start": before.length, "grpo": plain.length, "hapo": after.length},
        "p_accuracy": accuracy["p"],
        "p_length": paired_permutation_test(*paired_lengths(plain, after)),
        "minutes": [round(seeds.seconds(run) / 60, 1) for run in (hapo, grpo)],
    }


def main() -> None:
    parser = seeds.parser(__doc__, Path("runs/hapo_length"))
    parser.add_argument("--task", choices=TASKS, default="math", help="default: %(default)s")
    options = parser.parse_args()
    task, folder = TASKS[options.task], options.folder / options.task
    for seed in options.seeds:
        run_seed(task, seed, folder)
    rows = [row(seed, folder) for seed in options.seeds]
    evaluations = [
        [load(folder / f"{name}-{seed}", "after") for name in ("grpo", "hapo")] for seed in options.seeds
    ]
    lengths_by_seed = [paired_lengths(*pair) for pair in evaluations]
    names = ("start", "grpo", "hapo")
    result = {
        "warm_start": seeds.config_of(folder / "warm-start"),
        "config": seeds.config_of(folder / f"hapo-{options.seeds[0]}"),
        "seeds": rows,
        "p_accuracy_all_seeds": seeds.pooled_p_value(evaluations, None),
        "p_length_all_seeds": paired_permutation_test(*np.concatenate(lengths_by_seed, axis=1)),
        "mean_accuracy": {n: float(np.mean([r["accuracy"][n] for r in rows])) for n in names},
        "mean_length": {n: float(np.mean([r["length"][n] for r in rows])) for n in names},
    }
    results = json.loads(RESULT.read_text()) | {options.task: result}
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("mean_accuracy", "mean_length")}))


if __name__ == "__main__":
    main()
