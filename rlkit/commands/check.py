"""`rlkit check`: validate an environment without a model, its exact solver, or a reward with labels."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict

from rlkit.arguments.bounds import COUNT, POSITIVE, SEED, check_number
from rlkit.arguments.command_line import CommandParser
from rlkit.check.agreement import solver_agreement
from rlkit.check.checks import Check, check_environment
from rlkit.environment import SPLITS, Environment
from rlkit.errors import UserError, one_line
from rlkit.registry import load_environment

DEFAULT_REWARD = "judge"
# Options that only --agreement reads, and those that only the checks of the environment read.
REWARD_OPTIONS = ("reward", "reward_args", "reward_concurrency", "reward_time_limit")
TASK_OPTIONS = ("num_tasks", "split", "seed")


def main(argv: Sequence[str]) -> int:
    """Print the results and return the exit code: 0 if no check failed or a reward has scores, else 1."""
    parser = build_parser()
    options = parser.parse_args(argv)
    check_options(options, parser)
    environment = load_environment(options.environment, **options.environment_args)
    if options.agreement is not None:
        return print_agreement(environment, options)
    if options.items:
        agreement = solver_agreement(environment, options.items)
        print(json.dumps(asdict(agreement)) if options.json else agreement)
        return 0
    checks = check_environment(environment, options.num_tasks, options.seed, options.split)
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        for check in checks:
            print(format_check(check))
    return 0 if all(check.passed for check in checks) else 1


def format_check(check: Check) -> str:
    """Return the line of a check: ok, FAIL with the problem, or skip with why it does not apply."""
    if not check.applies:
        return f"skip  {check.name}: does not apply because {check.detail}"
    return f"ok    {check.name}" if check.passed else f"FAIL  {check.name}: {one_line(check.detail)}"


def check_options(options: Namespace, parser: CommandParser) -> None:
    """Raise UserError for a number out of range, or for options that make no sense together."""
    check_number("--num_tasks (-n)", options.num_tasks, COUNT)
    check_number("--seed", options.seed, SEED)
    if options.reward_concurrency is not None:
        check_number("--reward_concurrency", options.reward_concurrency, COUNT)
    if options.reward_time_limit is not None:
        check_number("--reward_time_limit", options.reward_time_limit, POSITIVE)
    if options.agreement is None:
        for name in REWARD_OPTIONS:
            if getattr(options, name) not in (None, {}):
                raise UserError(f"--{name} needs --agreement FILE.jsonl")
        return
    if options.items is not None:
        raise UserError("set --agreement or --items, not both")
    for name in TASK_OPTIONS:
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name} has no effect with --agreement, which scores all rows of its file")


def print_agreement(environment: Environment, options: Namespace) -> int:
    """Print how well a reward agrees with labels; return 1 if it scored no row, else 0."""
    from rlkit.check.labels import label_agreement  # imports pandas and SciPy, which the checks do not need

    limits = {} if options.reward_time_limit is None else {"time_limit": options.reward_time_limit}
    agreement = label_agreement(
        environment,
        options.agreement,
        options.reward or DEFAULT_REWARD,
        options.reward_args,
        max_concurrent=options.reward_concurrency,
        **limits,
    )
    print(json.dumps(asdict(agreement)) if options.json else agreement)
    return 0 if agreement.num_scored else 1


def build_parser() -> CommandParser:
    """Build the parser of the command."""
    parser = CommandParser(
        prog="rlkit check",
        description="Validate an environment without a model: reference answers earn the maximum reward, "
        "empty and garbage answers do not, and tasks are reproducible and well-formed. The exit code is 1 if "
        "a check fails.",
        epilog="example: rlkit check causal-v1 --environment_args.num_nodes 4",
    )
    add = parser.add_argument
    add("environment", help="id (see `rlkit envs`), package.module:Class or path/file.py:Class")
    parser.add_environment_args()
    add("--split", choices=SPLITS, default="train", help="split of the tasks (default: train)")
    add("-n", "--num_tasks", type=int, default=32, metavar="N", help="number of tasks (default: 32)")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the tasks (default: 0)")
    add("--json", action="store_true", help="print the results as JSON")
    add(
        "--items",
        metavar="FILE.jsonl",
        help="skip the checks and report how often the environment's exact solver agrees with these "
        "published items (causal-v1: fields prompt and ground_truth)",
    )
    add_agreement_options(parser)
    return parser


def add_agreement_options(parser: CommandParser) -> None:
    """Add the options of `--agreement`."""
    add = parser.add_argument_group("agreement of a reward with labels").add_argument
    add(
        "--agreement",
        metavar="FILE.jsonl",
        help="skip the checks and report how well a reward agrees with the labels of these completions "
        "(fields completion, label and the columns that the reward reads)",
    )
    add("--reward", metavar="NAME", help=f"name of the reward (default: {DEFAULT_REWARD})")
    parser.add_mapping("reward_args", "arguments of the reward by its name as JSON", part="REWARD.KEY")
    add("--reward_concurrency", type=int, metavar="N", help="maximum number of concurrent calls")
    add(
        "--reward_time_limit",
        type=float,
        metavar="SECONDS",
        help="timeout of a call, unless the reward has a timeout of its own (default: 10)",
    )
