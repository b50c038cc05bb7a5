"""Shared code of the learning benchmarks: a warm start, GRPO with several seeds, and significance tests."""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from rlkit.evaluation import Evaluation, compare, compare_by, paired_permutation_test
from rlkit.evaluation.result import paired_scores_by, scores_of
from rlkit.evaluation.statistics import holm_correction

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
FOLDS, SEEN_DEV = 5, 0.1  # of collections that are split by document


def parser(description: str | None, folder: Path) -> argparse.ArgumentParser:
    """Return the parser of a learning benchmark, with its default folder of runs."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    result.add_argument(
        "--folder", type=Path, default=folder, help="folder of the runs (default: %(default)s)"
    )
    return result


def run_seed(configs: str, seed: int, folder: Path, *extra: str) -> None:
    """Run `smollm2_warm_start.yaml` and `smollm2.yaml` of a folder of configs, unless the runs exist.

    Args:
        configs: Name of the folder of configs.
        seed: Seed of both runs.
        folder: Folder of the runs.
        extra: Further options of `rlkit train`.
    """
    start, policy = folder / f"seed-{seed}-warm-start", folder / f"seed-{seed}"
    if not (start / "model").exists():
        launch("sft", CONFIGS / configs / "smollm2_warm_start.yaml", seed, start)
    if not (policy / "evaluation" / "after.json").exists():
        config = CONFIGS / configs / "smollm2.yaml"
        launch("train", config, seed, policy, "--model_name_or_path", str(start / "model"), *extra)


def write_fold(name: str, seed: int, folder: Path) -> Path:
    """Split a collection by document, with a test fold per seed, unless the folder exists, and return it."""
    out = folder / f"fold-{seed % FOLDS}"
    if not out.exists():
        options = ["--folds", str(FOLDS), "--fold", str(seed % FOLDS), "--seen_dev", str(SEEN_DEV)]
        script("split_collection", name, *options, "-o", str(out))
    return out


def script(name: str, *arguments: str) -> None:
    """Run a script of `scripts/`."""
    subprocess.run([sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments], check=True)


def launch(command: str, config: Path, seed: int, output: Path, *extra: str) -> None:
    """Run a command of rlkit with a seed, an output folder and further options."""
    options = ["--seed", str(seed), "--output_dir", str(output), "--overwrite", *extra]
    subprocess.run(["rlkit", command, "--config", str(config), *options], check=True)


def metrics(run: Path) -> list[dict]:
    """Return the logged lines of a run, in order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def seconds(run: Path, step: int | None = None) -> float:
    """Return the wall-clock seconds of a run up to its last logged line, or up to the last one of a step."""
    return [line["seconds"] for line in metrics(run) if step is None or line["step"] == step][-1]


def config_of(run: Path) -> dict:
    """Return the complete config of a run."""
    return yaml.safe_load((run / "config.yaml").read_text())


def collect(
    seeds: Sequence[int],
    folder: Path,
    rewards: Sequence[str] = (),
    columns: Sequence[str] = (),
    after: str = "after",
) -> dict:
    """Compare the evaluations before and after GRPO, for each seed and for all seeds together.

    Args:
        seeds: Seeds that were run.
        folder: Folder of the runs.
        rewards: Names of rewards to compare in addition to the metric.
        columns: Columns of the breakdown, by whose values the metric is compared, too.
        after: Name of the evaluation to compare with the one before: "after", or "step-18" for that step.
    """
    step = None if after == "after" else int(after.removeprefix("step-"))
    pairs = []
    rows = []
    for seed in seeds:
        run, start = folder / f"seed-{seed}", folder / f"seed-{seed}-warm-start"
        pair = [Evaluation.load(run / "evaluation" / f"{n}.json") for n in ("before", after)]
        minutes = round((seconds(start) + seconds(run, step)) / 60, 1)
        row = {"seed": seed, "minutes": minutes} | compare(*pair)
        row |= {name: compare(*pair, name) for name in rewards}
        rows.append(row | {"by": {column: compare_by(*pair, column) for column in columns}})
        pairs.append(pair)
    return {
        "config": config_of(folder / f"seed-{seeds[0]}"),
        "seeds": rows,
        "mean_difference": sum(row["difference"] for row in rows) / len(rows),
        "p_all_seeds": pooled_p_value(pairs, None),
        **{f"p_all_seeds_{name}": pooled_p_value(pairs, name) for name in rewards},
        "p_all_seeds_by": {column: pooled_p_values_by(pairs, column) for column in columns},
    }


def pooled_p_value(pairs: Sequence[Sequence[Evaluation]], reward: str | None) -> float:
    """Return the p value of the paired permutation test over the tasks of all seeds."""
    before, after = [], []
    for pair in pairs:
        first, second = (scores_of(evaluation, reward) for evaluation in pair)
        for task in first:
            if first[task] and second.get(task):
                before.append(sum(first[task]) / len(first[task]))
                after.append(sum(second[task]) / len(second[task]))
    return paired_permutation_test(before, after)


def pooled_p_values_of_pairs(evaluations: Sequence[Mapping[str, Evaluation]]) -> dict[str, float]:
    """Return the p values of all pairs of systems over the tasks of all seeds, corrected by Holm.

    Args:
        evaluations: The evaluations of each seed by system, in the same order of systems.
    """
    pairs = list(itertools.combinations(evaluations[0], 2))
    p_values = [pooled_p_value([(seed[a], seed[b]) for seed in evaluations], None) for a, b in pairs]
    return dict(zip([f"{b}_against_{a}" for a, b in pairs], holm_correction(p_values), strict=True))


def pooled_p_values_by(pairs: Sequence[Sequence[Evaluation]], column: str) -> dict[str, float]:
    """Return the p values over the tasks of all seeds with each value of a column, corrected by Holm."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for pair in pairs:
        for value, scores in paired_scores_by(*pair, column).items():
            groups.setdefault(value, []).extend(scores)
    p_values = [paired_permutation_test(*zip(*scores, strict=True)) for scores in groups.values()]
    return dict(zip(groups, holm_correction(p_values), strict=True))


def report(result: dict) -> None:
    """Print one line per seed."""
    for row in result["seeds"]:
        change = f"{row['before']:.1%} -> {row['after']:.1%}, p = {row['p']:.2g}"
        print(f"seed {row['seed']}: {change}, {row['minutes']} min")
        for column, groups in row["by"].items():
            for value, group in groups.items():
                change = f"{group['before']:.1%} -> {group['after']:.1%} of {group['n']}"
                print(f"  {column} {value}: {change}, corrected p = {group['corrected_p']:.2g}")
