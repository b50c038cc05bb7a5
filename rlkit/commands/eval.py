"""`rlkit eval`: evaluate a model on an environment or a retriever on a collection, or compare results.

rlkit eval runs/a/model --environment causal-v1 -n 400 --samples 8 --temperature 1
rlkit eval --collection data/scifact --retriever bm25 -o bm25.json --run_file bm25.run
rlkit eval --compare runs/a/evaluation/before.json runs/a/evaluation/after.json
rlkit eval --leaderboard human/*.json --against synthetic/*.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlkit.arguments.bounds import COUNT, check_evaluation, check_number
from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.environment import SPLITS
from rlkit.errors import UserError

if TYPE_CHECKING:
    from rlkit.evaluation import Evaluation

DEPTH = 1000  # trec_eval's usual depth of a ranking


def main(argv: Sequence[str]) -> int:
    """Evaluate or compare, print the result, and return the exit code."""
    options = build_parser().parse_args(argv)
    _check(options)
    from rlkit.evaluation import Evaluation, compare
    from rlkit.evaluation.rankings import leaderboard_agreement

    if options.compare:
        before, after = (Evaluation.load(path) for path in options.compare)
        difference = compare(before, after, options.reward)
        print(json.dumps(difference) if options.json else _format_comparison(difference))
        return 0
    if options.leaderboard:
        first = [Evaluation.load(path) for path in options.leaderboard]
        second = [Evaluation.load(path) for path in options.against]
        result = leaderboard_agreement(first, second, options.reward)
        print(json.dumps(result) if options.json else _format_agreement(result))
        return 0
    evaluation = _evaluate_retriever(options) if options.collection else _evaluate_model(options)
    if options.out:
        evaluation.save(options.out)
    print(json.dumps(_summary(evaluation)) if options.json else _format_evaluation(evaluation))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that contradict each other or are out of range."""
    if (options.leaderboard is None) != (options.against is None):
        raise UserError("--leaderboard and --against compare two leaderboards; set both or neither")
    if options.compare or options.leaderboard:
        return
    if options.reward:
        raise UserError("--reward requires --compare or --leaderboard; an evaluation reports all rewards")
    if options.collection:
        if not options.retriever or options.model or options.environment:
            raise UserError(
                "--collection requires --retriever and cannot be combined with a model or --environment"
            )
    elif options.retriever or options.measures or options.run_file or options.depth != DEPTH:
        raise UserError("--retriever, --measures, --depth and --run_file require --collection")
    elif not options.model or not options.environment:
        raise UserError(
            "rlkit eval requires a model and --environment, or --collection and --retriever, or --compare, "
            "or --leaderboard and --against"
        )
    check_number("depth", options.depth, COUNT)
    check_evaluation(vars(options))


def build_parser() -> CommandParser:
    """Build the parser of the command."""
    parser = CommandParser(
        prog="rlkit eval",
        description="Evaluate a model on held-out tasks of an environment, or a retriever on a collection; "
        "or compare saved results.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model: Hub id, local path or bundled:smollm2-135m")
    add("--environment", metavar="NAME", help="environment: id, package.module:Class or path/file.py:Class")
    parser.add_environment_args()
    add("--evaluation_split", choices=SPLITS, default="test", help="split of the tasks (default: test)")
    add("-n", "--evaluation_tasks", type=int, metavar="N",
        help="number of tasks (default: set by the environment) or queries (default: all)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="random seed of tasks and sampling (default: 0)")
    add("--samples", type=int, default=1, metavar="N",
        help="completions per task, for pass@k and avg@k (default: 1)")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="T",
        help="sampling temperature; 0 is greedy decoding (default: 0)")  # fmt: skip
    add("--top_p", type=float, default=1.0, metavar="P", help="nucleus sampling threshold (default: 1)")
    add("--max_completion_length", type=int, default=512, metavar="TOKENS",
        help="maximum number of completion tokens (default: 512)")  # fmt: skip
    add("--evaluation_batch_size", type=int, default=64, metavar="N",
        help="number of completions per batch (default: 64)")  # fmt: skip
    add("--dtype", default="auto", help="weight dtype: auto, bfloat16, float16 or float32 (default: auto)")
    add("--trust_remote_code", action="store_true", help="allow model code from the Hugging Face Hub")
    add("--fold", metavar="FILE:NAME", help="fold to take the tasks from; see scripts/split_tasks.py")
    add("--collection", metavar="NAME", help="retrieval collection to evaluate the retriever on; "
        "--environment_args folds and fold select one cross-validation fold")  # fmt: skip
    add("--retriever", metavar="NAME",
        help="bm25, dense:MODEL, hybrid:MODEL, index folder, server URL or run:FILE")  # fmt: skip
    add("--measures", nargs="+", metavar="M", help="ranking measures (default: ndcg@10 recall@100 rr@10)")
    add("--depth", type=int, default=DEPTH, metavar="K",
        help=f"number of documents per ranking (default: {DEPTH})")  # fmt: skip
    add("--run_file", type=output_file, metavar="FILE", help="output file for the rankings, in TREC format")
    add("-o", "--out", type=output_file, metavar="FILE.json",
        help="output file for the full result, including all completions")  # fmt: skip
    add("--json", action="store_true", help="print the summary as JSON")
    add("--compare", nargs=2, metavar=("A.json", "B.json"),
        help="two saved results to compare with a paired test")  # fmt: skip
    add("--leaderboard", nargs="+", metavar="A.json",
        help="saved results of several models on one set of tasks")  # fmt: skip
    add("--against", nargs="+", metavar="B.json",
        help="saved results of the same models on another set; prints Kendall's tau")  # fmt: skip
    add("--reward", metavar="NAME", help="reward to compare (default: the environment's metric)")
    return parser


def _evaluate_model(options: argparse.Namespace) -> Evaluation:
    from rlkit.evaluation.model import evaluate_model

    keys = (
        "environment_args", "evaluation_split", "evaluation_tasks", "evaluation_batch_size", "fold", "seed",
        "samples", "temperature", "top_p", "max_completion_length", "dtype", "trust_remote_code",
    )  # fmt: skip
    arguments = {key: getattr(options, key) for key in keys}
    return evaluate_model(options.model, options.environment, name=_name(options), **arguments)


def _name(options: argparse.Namespace) -> str:
    return options.out.stem if options.out else "evaluation"


def _evaluate_retriever(options: argparse.Namespace) -> Evaluation:
    from rlkit.evaluation.rankings import evaluate_rankings

    if unknown := set(options.environment_args) - {"folds", "fold"}:
        names = ", ".join(sorted(unknown))
        raise UserError(f"with --collection, --environment_args takes only folds and fold, not {names}")
    return evaluate_rankings(
        options.collection,
        options.retriever,
        name=_name(options),
        split=options.evaluation_split,
        seed=options.seed,
        folds=options.environment_args,
        n=options.evaluation_tasks,
        measures=options.measures,
        depth=options.depth,
        run_file=options.run_file,
    )


def _summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return the fields of an evaluation except those with an entry per task or completion."""
    return {key: value for key, value in asdict(evaluation).items() if key not in ("scores", "completions")}


def _format_evaluation(evaluation: Evaluation) -> str:
    a = evaluation.accuracy
    lines = [
        f"{evaluation.metric}  {a.mean:.3f}  [{a.low:.3f}, {a.high:.3f}]  ({a.n} tasks, {evaluation.split})"
    ]
    if evaluation.samples > 1:
        for label, values in (("pass", evaluation.pass_at), ("avg", evaluation.avg_at)):
            lines.append("  ".join(f"{label}@{k} {value:.3f}" for k, value in values.items()))
    if evaluation.environment != "collection":
        lines.append(
            f"length {evaluation.length:.1f} tokens, truncated {evaluation.truncated:.1%}, "
            f"invalid {evaluation.invalid}"
        )
    lines += [f"reward {name}  {value:.3f}" for name, value in evaluation.rewards.items()]
    for column, groups in evaluation.breakdown.items():
        for value, group in groups.items():
            interval = f"[{group.low:.3f}, {group.high:.3f}]"
            lines.append(f"{column} = {value}: {group.mean:.3f}  {interval}  ({group.n} tasks)")
    return "\n".join(lines)


def _format_agreement(result: dict[str, Any]) -> str:
    lines = [f"{first:.3f}  {second:.3f}  {name}" for name, first, second in result["systems"]]
    return "\n".join([*lines, f"Kendall's tau {result['tau']:.3f}, p = {result['p']:.3g}"])


def _format_comparison(result: dict[str, Any]) -> str:
    return (
        f"{result['before']:.3f} -> {result['after']:.3f} on {result['n']} tasks: difference "
        f"{result['difference']:+.3f} [{result['low']:+.3f}, {result['high']:+.3f}], "
        f"paired permutation p = {result['p']:.3g}"
    )
