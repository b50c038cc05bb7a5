"""`rlkit eval`: answer tasks with a model, score the rankings of a retriever, or compare results.

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

DEPTH = 1000


def main(argv: Sequence[str]) -> int:
    """Evaluate or compare, print the result, and return the exit code."""
    options = build_parser().parse_args(argv)
    _check(options)
    from rlkit.evaluation import Evaluation, compare
    from rlkit.evaluation.rankings import agreement

    if options.compare:
        before, after = (Evaluation.load(path) for path in options.compare)
        difference = compare(before, after, options.reward)
        print(json.dumps(difference) if options.json else _comparison(difference))
        return 0
    if options.leaderboard:
        first, second = (
            [Evaluation.load(path) for path in board] for board in (options.leaderboard, options.against)
        )
        found = agreement(first, second, options.reward)
        print(json.dumps(found) if options.json else _agreement(found))
        return 0
    result = _rankings(options) if options.collection else _evaluate(options)
    if options.out:
        result.save(options.out)
    print(json.dumps(_short(result)) if options.json else _table(result))
    return 0


def _check(options: argparse.Namespace) -> None:
    if (options.leaderboard is None) != (options.against is None):
        raise UserError("--leaderboard and --against go together: two leaderboards are compared")
    if options.compare or options.leaderboard:
        return
    if options.reward:
        raise UserError("--reward says what is compared; an evaluation has all of them")
    if options.collection:
        if not options.retriever or options.model or options.environment:
            raise UserError("--collection goes with --retriever, without a model and --environment")
    elif options.retriever or options.measures or options.run_file or options.depth != DEPTH:
        raise UserError("--retriever, --measures, --depth and --run_file need --collection")
    elif not options.model or not options.environment:
        raise UserError(
            "rlkit eval needs a model and --environment, --collection and --retriever, or --compare"
        )
    check_number("depth", options.depth, COUNT)
    check_evaluation(vars(options))


def build_parser() -> CommandParser:
    """Build the parser of the command."""
    parser = CommandParser(
        prog="rlkit eval", description="Answer held-out tasks with a model, or rank, and score that."
    )
    add = parser.add_argument
    add("model", nargs="?", help="a hub name, a folder, or bundled:smollm2-135m")
    add("--environment", help="an id, package.module:Class or path/file.py:Class")
    parser.add_environment_args("arguments of the environment; of a collection: folds and fold")
    add("--evaluation_split", choices=SPLITS, default="test", help="split of the tasks (default: test)")
    add("-n", "--evaluation_tasks", type=int, metavar="N",
        help="number of tasks (default: the environment's own)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the tasks and of sampling (default: 0)")
    add("--samples", type=int, default=1, help="answers per task, for pass@k and avg@k (default: 1)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--top_p", type=float, default=1.0, help="nucleus sampling (default: 1)")
    add("--max_completion_length", type=int, default=512, help="tokens (default: 512)")
    add("--evaluation_batch_size", type=int, default=64, help="completions at a time (default: 64)")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--fold", metavar="FILE:NAME", help="only the tasks of a fold of scripts/split_tasks.py")
    add("--collection", metavar="NAME", help="score rankings of its queries")
    add("--retriever", metavar="NAME", help="bm25, dense:MODEL, hybrid:MODEL, a folder, a URL or run:FILE")
    add("--measures", nargs="+", metavar="M", help="of rankings (default: ndcg@10 recall@100 rr@10)")
    add("--depth", type=int, default=DEPTH, help=f"documents of a ranking (default: {DEPTH})")
    add("--run_file", type=output_file, help="write the rankings in TREC's format")
    add("-o", "--out", type=output_file, help="write the whole result, with every answer, as JSON")
    add("--json", action="store_true", help="print the numbers as JSON")
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help="paired comparison of two results")
    add("--leaderboard", nargs="+", metavar="A.json", help="results of several models on one set of tasks")
    add("--against", nargs="+", metavar="B.json", help="and on another: Kendall's tau of the two orders")
    add("--reward", metavar="NAME", help="the reward to compare (default: the environment's metric)")
    return parser


def _evaluate(options: argparse.Namespace) -> Evaluation:
    from rlkit.evaluation.model import evaluate_model

    keys = (
        "environment_args", "evaluation_split", "evaluation_tasks", "evaluation_batch_size", "fold", "seed",
        "samples", "temperature", "top_p", "max_completion_length", "dtype", "trust_remote_code",
    )  # fmt: skip
    given = {key: getattr(options, key) for key in keys}
    return evaluate_model(options.model, options.environment, name=_name(options), **given)


def _name(options: argparse.Namespace) -> str:
    return options.out.stem if options.out else "evaluation"


def _rankings(options: argparse.Namespace) -> Evaluation:
    from rlkit.evaluation.rankings import evaluate_rankings

    if unknown := set(options.environment_args) - {"folds", "fold"}:
        raise UserError(
            f"--environment_args of a collection are folds and fold, not {', '.join(sorted(unknown))}"
        )
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


def _short(result: Evaluation) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if key not in ("scores", "completions")}


def _table(result: Evaluation) -> str:
    a = result.accuracy
    lines = [f"{result.metric}  {a.mean:.3f}  [{a.low:.3f}, {a.high:.3f}]  ({a.n} tasks, {result.split})"]
    for label, values in (("pass", result.pass_at), ("avg", result.avg_at)):
        if result.samples > 1:
            lines.append("  ".join(f"{label}@{k} {value:.3f}" for k, value in values.items()))
    if result.environment != "collection":
        lines.append(
            f"length {result.length:.1f} tokens, truncated {result.truncated:.1%}, invalid {result.invalid}"
        )
    lines += [f"reward {name}  {value:.3f}" for name, value in result.rewards.items()]
    for column, parts in result.breakdown.items():
        for value, part in parts.items():
            lines.append(
                f"{column} = {value}: {part.mean:.3f}  [{part.low:.3f}, {part.high:.3f}]  ({part.n} tasks)"
            )
    return "\n".join(lines)


def _agreement(found: dict[str, Any]) -> str:
    lines = [f"{a:.3f}  {b:.3f}  {name}" for name, a, b in found["systems"]]
    return "\n".join([*lines, f"Kendall's tau {found['tau']:.3f}, p = {found['p']:.3g}"])


def _comparison(result: dict[str, Any]) -> str:
    return (
        f"{result['before']:.3f} -> {result['after']:.3f} on {result['n']} tasks: difference "
        f"{result['difference']:+.3f} [{result['low']:+.3f}, {result['high']:+.3f}], "
        f"paired permutation p = {result['p']:.3g}"
    )
