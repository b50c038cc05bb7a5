"""Does a ranking policy learn more than InfoNCE? The recipe of `make ranking`, with three seeds.

Each seed makes a collection, trains the same adapter from the same start with both objectives, and ranks the
candidates of unseen queries: nDCG@10. The keys of both configs were chosen on the dev queries of collection
0, which is none of these. With --cranfield the queries of a folder in BEIR's layout instead, in five folds.

    python benchmarks/ranking_learning.py
    python benchmarks/ranking_learning.py --cranfield ../data/cranfield
"""

import argparse
import json
import subprocess
from pathlib import Path

import yaml

from rlkit.evaluation import Evaluation, compare, paired_permutation_test
from rlkit.evaluation.result import scores_of

CONFIGS = Path(__file__).parent.parent / "configs" / "ranking"
RESULTS = Path(__file__).parent / "results" / "ranking_learning.json"
OBJECTIVES = {"policy": "adapter.yaml", "infonce": "adapter_infonce.yaml"}
# 135 training queries a fold: less of both, chosen on the dev queries of the folds.
CRANFIELD = {
    "policy": ["--learning_rate", "1e-4", "--max_steps", "100", "--temperature", "0.02"],
    "infonce": ["--learning_rate", "1e-4", "--max_steps", "100", "--temperature", "0.05"],
}


def run(folder: Path, name: str, objective: str, *words: str) -> Path:
    """Train, unless that has been done."""
    out = folder / f"{name}-{objective}"
    if not (out / "evaluation" / "after.json").exists():
        command = ["rlkit", "rank", "--config", str(CONFIGS / OBJECTIVES[objective])]
        words = (*words, *(CRANFIELD[objective] if name.startswith("fold") else ()))
        subprocess.run([*command, "--output_dir", str(out), "--overwrite", "true", *words], check=True)
    return out


def of_one(folder: Path, name: str, *words: str) -> tuple[dict, dict[str, Evaluation]]:
    """Both objectives on one seed or fold: what was measured, and the evaluations."""
    runs = {objective: run(folder, name, objective, *words) for objective in OBJECTIVES}
    found = {key: Evaluation.load(path / "evaluation" / "after.json") for key, path in runs.items()}
    found["before"] = Evaluation.load(runs["policy"] / "evaluation" / "before.json")
    lines = (runs["policy"] / "metrics.jsonl").read_text().splitlines()
    row = {
        "name": name,
        "minutes_of_the_policy": round(json.loads(lines[-1])["seconds"] / 60, 1),
        "against_no_training": compare(found["before"], found["policy"]),
        "against_infonce": compare(found["infonce"], found["policy"]),
    }
    return row, found


def together(all_found: list[dict[str, Evaluation]], other: str) -> float:
    """The paired permutation test over the queries of all seeds or folds."""
    first, second = [], []
    for found in all_found:
        theirs, ours = scores_of(found[other]), scores_of(found["policy"])
        first += [theirs[task][0] for task in theirs]
        second += [ours[task][0] for task in theirs]
    return paired_permutation_test(first, second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--cranfield", help="a folder in BEIR's layout, without training queries")
    parser.add_argument("--folder", type=Path, default=Path("runs/ranking_learning"))
    options = parser.parse_args()
    arguments = yaml.safe_load((CONFIGS / OBJECTIVES["policy"]).read_text())["environment_args"]
    if options.cranfield:
        changes = {f"fold {i}": {"collection": options.cranfield, "folds": 5, "fold": i} for i in range(5)}
    else:
        changes = {f"seed {seed}": {"collection": f"generated:2000:{seed}"} for seed in options.seeds}
    settings = {
        name: ["--seed", name.split()[1], "--environment_args", json.dumps(arguments | change)]
        for name, change in changes.items()
    }
    measured = [of_one(options.folder, name.replace(" ", "-"), *words) for name, words in settings.items()]
    rows = [row for row, _ in measured]
    pairs = {"no_training": "before", "infonce": "infonce"}
    result = {
        "runs": rows,
        **{
            f"p_against_{name}": together([found for _, found in measured], key)
            for name, key in pairs.items()
        },
    }
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(
        json.dumps(before | {"cranfield" if options.cranfield else "generated": result}, indent=1) + "\n"
    )
    for row in rows:
        one, two = row["against_no_training"], row["against_infonce"]
        print(
            f"{row['name']}: none {one['before']:.3f}, infonce {two['before']:.3f}, policy {one['after']:.3f}"
        )
    print({name: value for name, value in result.items() if name.startswith("p_")})


if __name__ == "__main__":
    main()
