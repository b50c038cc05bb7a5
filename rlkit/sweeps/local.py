"""Points of a sweep on this machine, so many at a time, with a table that shows how they are doing."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from queue import SimpleQueue
from types import FrameType

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlkit.sweeps.point import FAILED, Point, objective_name

REFRESH_SECONDS = 2.0


class LocalPoint(Point):
    """A point that sees some of the machine's GPUs."""

    gpus = ""

    def _environment(self) -> dict[str, str]:
        return super()._environment() | ({"CUDA_VISIBLE_DEVICES": self.gpus} if self.gpus else {})


def run_points(points: Sequence[LocalPoint], parallel: int, gpus: Sequence[str]) -> bool:
    """Work on points until all have ended, or Ctrl-C or SIGTERM has them write checkpoints and leave.

    Args:
        gpus: names of those of this machine, shared out among the points that run at a time.

    Returns:
        Whether it came to its end.
    """
    lanes: SimpleQueue[str] = SimpleQueue()
    for lane in shares(parallel, gpus):
        lanes.put(lane)
    leave = threading.Event()

    def work(point: LocalPoint) -> None:
        if leave.is_set():
            return
        point.gpus = lanes.get()
        try:
            point.work()
        finally:
            lanes.put(point.gpus)

    def stop(number: int, frame: FrameType | None) -> None:
        leave.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(parallel) as pool, Live(auto_refresh=False, transient=True) as shown:
            futures = [pool.submit(work, point) for point in points]
            while not all(future.done() for future in futures) and not leave.wait(REFRESH_SECONDS):
                shown.update(live_view(points), refresh=True)
            for point in points if leave.is_set() else ():
                threading.Thread(target=point.leave).start()  # all at once: each may take a while
            for future in futures:
                future.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return not leave.is_set()


def shares(parallel: int, gpus: Sequence[str]) -> list[str]:
    """Which GPUs each of the points at work at a time sees; with fewer GPUs than points, some share one."""
    if len(gpus) < parallel:
        return [gpus[i % len(gpus)] if gpus else "" for i in range(parallel)]
    cuts = [i * len(gpus) // parallel for i in range(parallel + 1)]
    return [",".join(gpus[a:b]) for a, b in pairwise(cuts)]


def live_view(points: Sequence[Point]) -> Group:
    """Return what is shown while the points are worked on: the table, and the errors below it.

    A terminal may be too low for all of it: points at work come first, those that have not begun last.
    """
    order = sorted(points, key=lambda point: (point.keys() is None, point.outcome() is not None))
    return Group(table(order), *map(Text, failures(points)))


def table(points: Sequence[Point]) -> Table:
    """Return a table of the points' keys, states and held-out results, with every value in full.

    Errors are not in it: next to the keys they would leave too little of 80 columns to either (`failures`).
    """
    shown = Table()
    for header in ("point", "keys", "state", "step", objective_name(points)):
        shown.add_column(header, overflow="fold")
    for point in points:
        # Text: in a string rich would take "[...]" for markup and drop it.
        pairs = [Text(f"{key}={value}") for key, value in (point.keys() or {}).items()]
        shown.add_row(str(point.number), Text("\n").join(pairs), *state(point))
    return shown


def failures(points: Sequence[Point]) -> list[str]:
    """Return a line for each failed point: its number, its error and its folder."""
    outcomes = [(point, point.outcome()) for point in points]
    return [
        f"point {point.number} failed: {outcome.error} ({point.folder})"
        for point, outcome in outcomes
        if outcome is not None and outcome.state == FAILED
    ]


def state(point: Point) -> tuple[str, str, str]:
    """Return a point's state, step and held-out result."""
    outcome = point.outcome()
    if outcome is not None:
        return outcome.state, "", "" if outcome.value is None else f"{outcome.value:.4g}"
    seed = next((s for s in point.sweep.seeds if not point.finished(s)), None)
    if point.keys() is None or seed is None:
        return "waiting", "", ""
    held_out = point.last(seed)
    return f"seed {seed}", last_step(point, seed), "" if held_out is None else f"{held_out:.4g}"


def last_step(point: Point, seed: int) -> str:
    """The newest step in a run's metrics."""
    path = point.run_dir(seed) / "metrics.jsonl"
    if not path.exists():
        return "starting"
    with path.open("rb") as file:
        file.seek(max(os.path.getsize(path) - 20_000, 0))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return str(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return ""
