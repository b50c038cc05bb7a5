"""Does the Plackett-Luce policy gradient learn more than InfoNCE? The recipe of `make ranking`, three seeds.

Each seed generates a collection, trains the same adapter from the same initialization with both objectives,
and reports nDCG@10 on unseen queries. The hyperparameters of both were chosen on the dev queries of
collection 0, which is not used here. With --cranfield, the queries come from a folder in BEIR format, in five
folds.

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
# A fold has only 135 training queries: fewer steps and smaller ones, chosen on the dev queries of the folds.
CRANFIELD = {
    "policy": ["--learning_rate", "1e-4", "--max_steps", "100", "--temperature", "0.02"],
    "infonce": ["--learning_rate", "1e-4", "--max_steps", "100", "--temperature", "0.05"],
}


def run(folder: Path, name: str, objective: str, *extra: str) -> Path:
    """Train with one objective, unless the run exists, and return its directory."""
    out = folder / f"{name}-{objective}"
    if not (out / "evaluation" / "after.json").exists():
        command = ["rlkit", "rank", "--config", str(CONFIGS / OBJECTIVES[objective])]
        if name.startswith("fold"):
            extra = (*extra, *CRANFIELD[objective])
        subprocess.run([*command, "--output_dir", str(out), "--overwrite", "true", *extra], check=True)
    return out


def run_both(folder: Path, name: str, *extra: str) -> tuple[dict, dict[str, Evaluation]]:
    """Train both objectives on one seed or fold; return the row of the result and the evaluations."""
    runs = {objective: run(folder, name, objective, *extra) for objective in OBJECTIVES}
    evaluations = {key: Evaluation.load(path / "evaluation" / "after.json") for key, path in runs.items()}
    evaluations["before"] = Evaluation.load(runs["policy"] / "evaluation" / "before.json")
    lines = (runs["policy"] / "metrics.jsonl").read_text().splitlines()
    row = {
        "name": name,
        "minutes_of_the_policy": round(json.loads(lines[-1])["seconds"] / 60, 1),
        "against_no_training": compare(evaluations["before"], evaluations["policy"]),
        "against_infonce": compare(evaluations["infonce"], evaluations["policy"]),
    }
    return row, evaluations


def pooled_p_value(all_evaluations: list[dict[str, Evaluation]], baseline: str) -> float:
    """Return the p value of the policy against a baseline, over the queries of all seeds or folds."""
    before, after = [], []
    for evaluations in all_evaluations:
        baseline_scores, policy_scores = scores_of(evaluations[baseline]), scores_of(evaluations["policy"])
        before += [baseline_scores[task][0] for task in baseline_scores]
        after += [policy_scores[task][0] for task in baseline_scores]
    return paired_permutation_test(before, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--cranfield", help="folder in BEIR format, without training queries")
    parser.add_argument("--folder", type=Path, default=Path("runs/ranking_learning"))
    options = parser.parse_args()
    environment_args = yaml.safe_load((CONFIGS / OBJECTIVES["policy"]).read_text())["environment_args"]
    if options.cranfield:
        changes = {f"fold {i}": {"collection": options.cranfield, "folds": 5, "fold": i} for i in range(5)}
    else:
        changes = {f"seed {seed}": {"collection": f"generated:2000:{seed}"} for seed in options.seeds}
    rows, all_evaluations = [], []
    for name, change in changes.items():
        arguments = ["--seed", name.split()[1], "--environment_args", json.dumps(environment_args | change)]
        row, evaluations = run_both(options.folder, name.replace(" ", "-"), *arguments)
        rows.append(row)
        all_evaluations.append(evaluations)
    result = {
        "runs": rows,
        "p_against_no_training": pooled_p_value(all_evaluations, "before"),
        "p_against_infonce": pooled_p_value(all_evaluations, "infonce"),
    }
    # The file holds the results of both kinds of collections.
    previous = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    key = "cranfield" if options.cranfield else "generated"
    RESULTS.write_text(json.dumps(previous | {key: result}, indent=1) + "\n")
    for row in rows:
        untrained, infonce = row["against_no_training"]["before"], row["against_infonce"]["before"]
        policy = row["against_no_training"]["after"]
        print(f"{row['name']}: none {untrained:.3f}, infonce {infonce:.3f}, policy {policy:.3f}")
    print({name: value for name, value in result.items() if name.startswith("p_")})


if __name__ == "__main__":
    main()
