"""`rlkit eval`: answer tasks with a model, score the rankings of a retriever, or compare results.

rlkit eval runs/a/model --environment causal-v1 --split test -n 400 --samples 8 --temperature 1
rlkit eval --collection data/scifact --retriever bm25 --out bm25.json --run-file bm25.run
rlkit eval --compare runs/a/evaluation/before.json runs/a/evaluation/after.json
rlkit eval --leaderboard human/*.json --against synthetic/*.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rlkit.arguments.keys import parse_environment_args
from rlkit.environment import SPLITS, Environment
from rlkit.errors import UserError
from rlkit.evaluation import Evaluation, compare, evaluate
from rlkit.evaluation.evaluate import Generate
from rlkit.evaluation.rankings import agreement, evaluate_rankings
from rlkit.evaluation.splits import read_fold
from rlkit.registry import load_environment
from rlkit.rollouts.loop import RolloutLimits
from rlkit.rollouts.sampler import open_sampler
from rlkit.rollouts.tokenize import eos_token_ids
from rlkit.scoring import RewardRunner, load_rewards

DEPTH = 1000


def main(argv: Sequence[str]) -> int:
    """Evaluate or compare, print the result, and return the exit code."""
    options = build_parser().parse_args(argv)
    options.args = parse_environment_args(options.args)
    if options.compare:
        before, after = (Evaluation.load(path) for path in options.compare)
        difference = compare(before, after, options.reward)
        print(json.dumps(difference) if options.json else _comparison(difference))
        return 0
    if options.leaderboard or options.against:
        first, second = (
            [Evaluation.load(path) for path in board or ()]
            for board in (options.leaderboard, options.against)
        )
        found = agreement(first, second, options.reward)
        print(json.dumps(found) if options.json else _agreement(found))
        return 0
    _check(options)
    result = _rankings(options) if options.collection else _evaluate(options)
    if options.out:
        result.save(options.out)
    print(json.dumps(_short(result)) if options.json else _table(result))
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.reward:
        raise UserError("--reward says what is compared; an evaluation has all of them")
    if options.collection:
        if not options.retriever or options.model or options.environment:
            raise UserError("--collection goes with --retriever, without a model and --environment")
    elif options.retriever or options.measures or options.run_file or options.depth != DEPTH:
        raise UserError("--retriever, --measures, --depth and --run-file need --collection")
    elif not options.model or not options.environment:
        raise UserError(
            "rlkit eval needs a model and --environment, --collection and --retriever, or --compare"
        )
    if options.n is not None and options.n < 1:
        raise UserError(f"-n is {options.n}: it must be at least 1")
    if options.samples < 1 or options.temperature < 0:
        raise UserError("--samples must be at least 1 and --temperature at least 0")
    if options.samples > 1 and options.temperature == 0:
        raise UserError("several samples at temperature 0 are all alike: give --temperature 1")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="rlkit eval", description="Answer held-out tasks with a model, or rank, and score that."
    )
    add = parser.add_argument
    add("model", nargs="?", help="a hub name, a folder, or bundled:smollm2-135m")
    add("--environment", help="an id, package.module:Class or path/file.py:Class")
    add("--args", nargs="+", default=[], metavar="ARG",
        help="the environment's options: a JSON object, or key=value pairs")  # fmt: skip
    add("--split", choices=SPLITS, default="test", help="(default: test)")
    add("-n", type=int, help="tasks (default: the environment's own number)")
    add("--seed", type=int, default=0, help="of the tasks and of sampling (default: 0)")
    add("--samples", type=int, default=1, help="answers a task, for pass@k and avg@k (default: 1)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1)")
    add("--max-completion-length", type=int, default=512, help="tokens (default: 512)")
    add("--batch-size", type=int, default=64, help="completions at a time (default: 64)")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--fold", metavar="FILE:NAME", help="only the tasks of a fold of scripts/split_tasks.py")
    add(
        "--collection", metavar="NAME", help="score rankings of its queries; --args folds=5 fold=0 deals them"
    )
    add("--retriever", metavar="NAME", help="bm25, dense:MODEL, hybrid:MODEL, a folder, a URL or run:FILE")
    add("--measures", nargs="+", metavar="M", help="of rankings (default: ndcg@10 recall@100 rr@10)")
    add("--depth", type=int, default=DEPTH, help=f"documents of a ranking (default: {DEPTH})")
    add("--run-file", type=Path, help="write the rankings in TREC's form")
    add("--out", type=Path, help="write the whole result, with every answer, as JSON")
    add("--json", action="store_true", help="print the numbers as JSON")
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help="paired comparison of two results")
    add("--leaderboard", nargs="+", metavar="A.json", help="results of several models on one set of tasks")
    add("--against", nargs="+", metavar="B.json", help="and on another: Kendall's tau of the two orders")
    add("--reward", metavar="NAME", help="the reward to compare (default: the environment's metric)")
    return parser


def _evaluate(options: argparse.Namespace) -> Evaluation:
    environment = load_environment(options.environment, **options.args)
    fold = None if options.fold is None else read_fold(options.fold, environment)
    generate = _sampler(options, environment)
    rewards, _ = load_rewards(None, environment, None)
    with RewardRunner(rewards, metric=environment.metric) as runner:
        return evaluate(
            generate,
            environment,
            runner,
            split=options.split,
            n=options.n,
            seed=options.seed,
            fold=fold,
            samples=options.samples,
            name=options.out.stem if options.out else "evaluation",
            model=options.model,
            environment_args=options.args,
            temperature=options.temperature,
            max_length=options.max_completion_length,
        )


def _rankings(options: argparse.Namespace) -> Evaluation:
    if unknown := set(options.args) - {"folds", "fold"}:
        raise UserError(f"--args of a collection are folds and fold, not {', '.join(sorted(unknown))}")
    return evaluate_rankings(
        options.collection,
        options.retriever,
        name=options.out.stem if options.out else "evaluation",
        split=options.split,
        seed=options.seed,
        folds=options.args,
        n=options.n,
        measures=options.measures,
        depth=options.depth,
        run_file=options.run_file,
    )


def _sampler(options: argparse.Namespace, environment: Environment) -> Generate:
    """Load the model and return what answers tasks with it."""
    import torch
    from transformers import set_seed
    from trl import ModelConfig

    from rlkit.models.cpu import tune_for_cpu
    from rlkit.models.load import load_model
    from rlkit.rollouts.local.engine import TransformersEngine

    set_seed(options.seed)
    config = ModelConfig(model_name_or_path=options.model, dtype=options.dtype)
    model, tokenizer = load_model(config, trust_remote_code=options.trust_remote_code)
    if torch.cuda.is_available():
        model.to("cuda")
    else:
        tune_for_cpu()
    model.eval()
    sampler = open_sampler(
        environment,
        tokenizer,
        eos_token_ids(model.generation_config.eos_token_id, tokenizer),
        RolloutLimits(options.max_completion_length, turns=environment.max_turns),
        temperature=options.temperature,
        top_p=options.top_p,
    )
    return partial(sampler, TransformersEngine(model, tokenizer, batch_size=options.batch_size))


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
