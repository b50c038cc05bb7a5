"""`rlkit sweep SWEEP.yaml`: search hyperparameters on this machine, on Slurm or with W&B agents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.arguments.command_line import CommandParser, check_keys
from rlkit.errors import UserError
from rlkit.sweeps.spec import FAILED, FINISHED, Sweep, load_sweep, no_such_objective

if TYPE_CHECKING:
    from rlkit.sweeps.point import Point

LAUNCHERS = ("local", "slurm", "wandb")
MAX_CHECKED_POINTS = 100  # a larger grid is checked only at its corners, so that a check stays fast


def main(argv: Sequence[str]) -> int:
    """Start or resume a sweep, or only collect its results; return the exit code, 1 if points failed."""
    options = build_parser().parse_args(argv)
    sweep = load_sweep(options.sweep)
    if not options.collect:
        check_point_keys(sweep)  # fails within a second, before importing torch and Optuna
    from rlkit.sweeps.point import Point

    if options.launcher == "wandb":
        return _write_wandb(sweep)
    points = [Point(sweep, number) for number in range(sweep.size)]
    if not options.collect:
        check_points(sweep)
        if options.retry:
            _reset_failed(points)
        unfinished = [point for point in points if needs_work(point)]
        if options.launcher == "slurm":
            return _submit_to_slurm(sweep, unfinished)
        if not _run_locally(sweep, unfinished):
            print("stopped; rerun the command to resume")
    return _collect(sweep, points)


def build_parser() -> CommandParser:
    """Build the parser of the command."""
    parser = CommandParser(
        prog="rlkit sweep",
        description="Search hyperparameters of a config: grid, random or Optuna. The same command resumes an "
        "interrupted sweep.",
    )
    add = parser.add_argument
    add("sweep", type=Path, metavar="SWEEP.yaml", help="sweep file; docs/sweeps.md describes its fields")
    add("--launcher", choices=LAUNCHERS, default="local", help="where to run the points (default: local)")
    add("--retry", action="store_true", help="retry failed points")
    add("--collect", action="store_true", help="only write the table and the report of the results so far")
    return parser


def check_point_keys(sweep: Sweep) -> None:
    """Raise UserError if a point has an unknown key or an invalid value."""
    for keys in checked_points(sweep):
        with _named_errors(keys):
            check_keys(sweep.command, [sweep.base, *sweep.to_argv(keys), f"--output_dir={sweep.folder}"])


def checked_points(sweep: Sweep) -> Sequence[dict[str, Any]]:
    """Return all points of a small grid, else points that cover each listed value and both ends of ranges."""
    if sweep.search == "grid" and sweep.size <= MAX_CHECKED_POINTS:
        return list(sweep.grid())
    return sweep.corners()


def check_points(sweep: Sweep) -> str:
    """Check that the points can run and be compared, and return the name of their metric.

    This parses the keys as a run would and builds the environments and rewards.

    Raises:
        UserError: A point cannot run, or the points cannot be compared.
    """
    from rlkit.arguments.parse import PARSERS
    from rlkit.scoring import load_rewards
    from rlkit.training.session import load_run_rewards, make_environment

    parse = PARSERS[sweep.command]
    metrics: dict[str, None] = {}  # an ordered set
    for keys in checked_points(sweep):
        with _named_errors(keys):
            run = parse([sweep.base, *sweep.to_argv(keys), f"--output_dir={sweep.folder}"])
            environment = make_environment(run.args)
            metrics[environment.metric] = None
            if sweep.objective is not None:
                if sweep.command == "train":
                    rewards, _ = load_run_rewards(run, environment)
                else:
                    rewards, _ = load_rewards(None, environment, None)
                if sweep.objective not in rewards:
                    raise UserError(no_such_objective(sweep.objective, environment.metric, rewards))
    if len(metrics) > 1 and sweep.objective is None:
        raise UserError(
            f"the points have different metrics ({', '.join(metrics)}); "
            "set objective to a reward that all of them have"
        )
    if not run.args.evaluation_tasks:
        raise UserError(
            f"{sweep.base} has evaluation_tasks 0, but points are compared on held-out tasks; "
            "set evaluation_tasks"
        )
    if sweep.pruning and not run.args.evaluation_steps:
        raise UserError("pruning needs evaluations during training; set evaluation_steps in the base config")
    return next(iter(metrics))


@contextmanager
def _named_errors(keys: Mapping[str, Any]) -> Iterator[None]:
    """Prefix a UserError with the keys of a point."""
    try:
        yield
    except UserError as error:
        point = ", ".join(f"{key}={value}" for key, value in keys.items())
        raise UserError(f"{point}: {error}") from error


def needs_work(point: Point) -> bool:
    """Return whether a point has runs to do. A failed point has none until `--retry` resets it."""
    outcome = point.outcome()
    if outcome is None:
        return True
    return outcome.state == FINISHED and not all(map(point.is_finished, point.sweep.seeds))


def _reset_failed(points: Sequence[Point]) -> None:
    for point in points:
        outcome = point.outcome()
        if outcome is not None and outcome.state == FAILED:
            point.reset()


def _run_locally(sweep: Sweep, points: Sequence[Point]) -> bool:
    from rlkit.runs.launch import gpus
    from rlkit.sweeps.local import LocalPoint, run_points
    from rlkit.sweeps.study import open_study

    open_study(sweep)
    local_points = [LocalPoint(sweep, point.number) for point in points]
    return run_points(local_points, sweep.parallel, gpus())


def _submit_to_slurm(sweep: Sweep, points: Sequence[Point]) -> int:
    from rlkit.sweeps.slurm import check, submit
    from rlkit.sweeps.study import open_study

    check(sweep.slurm)
    open_study(sweep)
    job, submitted = submit(sweep, points)
    if not submitted:
        print("nothing to submit: all points have ended or are in the queue")
        return 0
    print(f"submitted job {job} with {len(submitted)} points; logs are in {sweep.folder / 'slurm'}")
    print("`rlkit sweep --collect` shows the results so far; rerun this command to resubmit lost points")
    return 0


def _write_wandb(sweep: Sweep) -> int:
    from rlkit.sweeps.wandb import write_sweep

    path = write_sweep(sweep, metric=check_points(sweep))
    print(f"wandb sweep {path}")
    print("wandb agent ENTITY/PROJECT/ID   # `wandb sweep` prints this line; run it on each machine")
    return 0


def _collect(sweep: Sweep, points: Sequence[Point]) -> int:
    from rich.console import Console

    from rlkit.sweeps.collect import collect, headline, rows
    from rlkit.sweeps.local import failures, table

    results = rows(points)
    Console().print(table(points))
    csv, report = collect(sweep, points, results)
    print(headline(sweep, points, results))
    failure_lines = failures(points)
    for line in failure_lines:
        print(line)
    if failure_lines:
        print("rerun the command with --retry to retry them")
    print(f"table:  {csv}\nreport: {report}")
    return 1 if failure_lines else 0
