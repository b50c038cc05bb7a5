"""`rlkit check`: validate an environment without a model, or its exact solver on published items."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rlkit.arguments.bounds import COUNT, check_number
from rlkit.arguments.command_line import CommandParser
from rlkit.check.agreement import solver_agreement
from rlkit.check.checks import check_environment
from rlkit.environment import SPLITS
from rlkit.registry import load_environment


def main(argv: Sequence[str]) -> int:
    """Print the result of each check and return the exit code: 0 if all checks passed, else 1."""
    options = build_parser().parse_args(argv)
    check_number("--num_tasks (-n)", options.num_tasks, COUNT)
    environment = load_environment(options.environment, **options.environment_args)
    if options.items:
        agreement = solver_agreement(environment, options.items)
        print(json.dumps(asdict(agreement)) if options.json else agreement)
        return 0
    checks = check_environment(environment, options.num_tasks, options.seed, options.split)
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        for check in checks:
            print(f"ok    {check.name}" if check.passed else f"FAIL  {check.name}: {check.detail}")
    return 0 if all(check.passed for check in checks) else 1


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
    return parser
