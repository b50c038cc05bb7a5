"""`rlkit sweep SWEEP.yaml`: many runs of one config, here, on Slurm, or by W&B's agents."""

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
MAX_CHECKED = 100  # points of a grid whose keys are checked, one by one, before anything starts


def main(argv: Sequence[str]) -> int:
    """Start or continue a sweep, or say how it stands; the exit code is 1 if points failed."""
    options = build_parser().parse_args(argv)
    sweep = load_sweep(options.sweep)
    if not options.collect:
        check_points_keys(sweep)  # within a second, before torch and Optuna are imported
    from rlkit.sweeps.point import Point

    if options.launcher == "wandb":
        return _wandb(sweep)
    points = [Point(sweep, number) for number in range(sweep.size)]
    if not options.collect:
        check_points(sweep)
        if options.retry:
            _reset(points)
        left = [point for point in points if needs_work(point)]
        if options.launcher == "slurm":
            return _slurm(sweep, left)
        if not _local(sweep, left):
            print("stopped; rerun the command to resume")
    return _collected(sweep, points)


def build_parser() -> CommandParser:
    """Build the parser of the command."""
    parser = CommandParser(
        prog="rlkit sweep",
        description="Run a config with many keys: a grid, at random, by Optuna. The same command continues.",
    )
    add = parser.add_argument
    add("sweep", type=Path, metavar="SWEEP.yaml", help="base, keys, search and so on: see docs/sweeps.md")
    add("--launcher", choices=LAUNCHERS, default="local", help="where the runs are made (default: local)")
    add("--retry", action="store_true", help="try the points that failed again")
    add("--collect", action="store_true", help="start nothing: write the table and the page of what there is")
    return parser


def check_points_keys(sweep: Sweep) -> None:
    """Raise UserError for a point whose keys are wrong."""
    for keys in checked_points(sweep):
        with _of_point(keys):
            check_keys(sweep.command, [sweep.base, *sweep.words(keys), f"--output_dir={sweep.folder}"])


def checked_points(sweep: Sweep) -> Sequence[dict[str, Any]]:
    """Return all points of a small grid, else some that have each value of each key, or its ends, once."""
    small = sweep.search == "grid" and sweep.size <= MAX_CHECKED
    return list(sweep.grid()) if small else sweep.corners()


def check_points(sweep: Sweep) -> str:
    """Parse the keys of the sweep's corners as a run would, and return the name of their metric.

    Raises:
        UserError: a point could not run, or points could not be compared.
    """
    from rlkit.arguments.parse import PARSERS
    from rlkit.scoring import load_rewards
    from rlkit.training.session import load_run_rewards, make_environment

    parse = PARSERS[sweep.command]
    metrics: dict[str, None] = {}
    for keys in checked_points(sweep):
        with _of_point(keys):
            run = parse([sweep.base, *sweep.words(keys), f"--output_dir={sweep.folder}"])
            environment = make_environment(run.args)
            metrics[environment.metric] = None
            if sweep.objective is not None:
                trains = sweep.command == "train"
                rewards, _ = (
                    load_run_rewards(run, environment) if trains else load_rewards(None, environment, None)
                )
                if sweep.objective not in rewards:
                    raise UserError(no_such_objective(sweep.objective, environment.metric, rewards))
    metric, *others = metrics
    if others and sweep.objective is None:
        raise UserError(
            f"the points have different metrics ({', '.join(metrics)}): set objective to a reward of all"
        )
    if not run.args.evaluation_tasks:
        raise UserError(f"{sweep.base} has evaluation_tasks 0: points are compared by their held-out results")
    if sweep.pruning and not run.args.evaluation_steps:
        raise UserError("pruning looks at held-out results in training: set evaluation_steps in the base")
    return metric


@contextmanager
def _of_point(keys: Mapping[str, Any]) -> Iterator[None]:
    """Put the keys of a point in front of a UserError."""
    try:
        yield
    except UserError as error:
        point = ", ".join(f"{key}={value}" for key, value in keys.items())
        raise UserError(f"{point}: {error}") from error


def needs_work(point: Point) -> bool:
    """Whether runs of a point are left; failed ones are left alone."""
    outcome = point.outcome()
    if outcome is None:
        return True
    return outcome.state == FINISHED and not all(map(point.finished, point.sweep.seeds))


def _reset(points: Sequence[Point]) -> None:
    for point in points:
        outcome = point.outcome()
        if outcome is not None and outcome.state == FAILED:
            point.reset()


def _local(sweep: Sweep, points: Sequence[Point]) -> bool:
    from rlkit.runs.launch import gpus
    from rlkit.sweeps.local import LocalPoint, run_points
    from rlkit.sweeps.study import open_study

    open_study(sweep)
    here = [LocalPoint(sweep, point.number) for point in points]
    return run_points(here, sweep.parallel, gpus())


def _slurm(sweep: Sweep, points: Sequence[Point]) -> int:
    from rlkit.sweeps.slurm import check, submit
    from rlkit.sweeps.study import open_study

    check(sweep.slurm)
    open_study(sweep)
    job, submitted = submit(sweep, points)
    if not submitted:
        print("nothing to submit: all points have ended or are in the queue")
        return 0
    print(f"job {job}: {len(submitted)} points; logs are in {sweep.folder / 'slurm'}")
    print("rlkit sweep --collect shows how it stands; the same command submits again what was lost")
    return 0


def _wandb(sweep: Sweep) -> int:
    from rlkit.sweeps.wandb import write_sweep

    path = write_sweep(sweep, metric=check_points(sweep))
    print(f"wandb sweep {path}\nwandb agent ENTITY/PROJECT/ID   # as the line before says, on each machine")
    return 0


def _collected(sweep: Sweep, points: Sequence[Point]) -> int:
    from rich.console import Console

    from rlkit.sweeps.collect import collect, headline, rows
    from rlkit.sweeps.local import failures, table

    found = rows(points)
    Console().print(table(points))
    csv, page = collect(sweep, points, found)
    print(headline(sweep, points, found))
    failed = failures(points)
    for line in failed:
        print(line)
    if failed:
        print("--retry tries them again")
    print(f"table:  {csv}\nreport: {page}")
    return 1 if failed else 0
