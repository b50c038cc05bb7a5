"""Points of a sweep on this machine: a fixed number run at a time, and a live table shows their progress."""

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
TAIL_BYTES = 20_000  # end of metrics.jsonl that is searched for the last step


class LocalPoint(Point):
    """A point whose runs see some of the machine's GPUs."""

    gpus = ""  # value of CUDA_VISIBLE_DEVICES; empty: the runs see what this process sees

    def _environment(self) -> dict[str, str]:
        environment = super()._environment()
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus
        return environment


def run_points(points: Sequence[LocalPoint], parallel: int, gpus: Sequence[str]) -> bool:
    """Run points until all have ended; Ctrl-C or SIGTERM stops them with checkpoints.

    Args:
        points: Points to run.
        parallel: Maximum number of points that run at a time.
        gpus: Names of this machine's GPUs; the points that run at a time share them.

    Returns:
        True if all points have ended, False if a signal stopped them.
    """
    free_shares: SimpleQueue[str] = SimpleQueue()
    for share in gpu_shares(parallel, gpus):
        free_shares.put(share)
    stopping = threading.Event()

    def work(point: LocalPoint) -> None:
        if stopping.is_set():
            return
        point.gpus = free_shares.get()
        try:
            point.work()
        finally:
            free_shares.put(point.gpus)

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    previous_handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(parallel) as pool, Live(auto_refresh=False, transient=True) as live:
            futures = [pool.submit(work, point) for point in points]
            while not all(future.done() for future in futures) and not stopping.wait(REFRESH_SECONDS):
                live.update(live_view(points), refresh=True)
            if stopping.is_set():
                # A run needs time to write its checkpoint, so preempt all of them at once.
                for point in points:
                    threading.Thread(target=point.preempt).start()
            for future in futures:
                future.result()
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    return not stopping.is_set()


def gpu_shares(parallel: int, gpus: Sequence[str]) -> list[str]:
    """Return the CUDA_VISIBLE_DEVICES of each point that runs at a time.

    With fewer GPUs than points, several points share a GPU.
    """
    if not gpus:
        return [""] * parallel
    if len(gpus) < parallel:
        return [gpus[i % len(gpus)] for i in range(parallel)]
    cuts = [i * len(gpus) // parallel for i in range(parallel + 1)]
    return [",".join(gpus[start:end]) for start, end in pairwise(cuts)]


def live_view(points: Sequence[Point]) -> Group:
    """Return what the terminal shows while points run: the table with the errors below it.

    The terminal may be too short for all rows: running points come first, points that have not started last.
    """
    order = sorted(points, key=lambda point: (point.keys() is None, point.outcome() is not None))
    return Group(table(order), *map(Text, failures(points)))


def table(points: Sequence[Point]) -> Table:
    """Return a table of the keys, states and held-out results of points, with every value in full.

    Errors are printed below the table (`failures`): as a column they would leave the keys too little of 80
    columns.
    """
    rows = Table()
    for header in ("point", "keys", "state", "step", objective_name(points)):
        rows.add_column(header, overflow="fold")
    for point in points:
        # Text, not a string: rich would parse "[...]" in a string as markup and drop it.
        pairs = [Text(f"{key}={value}") for key, value in (point.keys() or {}).items()]
        rows.add_row(str(point.number), Text("\n").join(pairs), *progress(point))
    return rows


def failures(points: Sequence[Point]) -> list[str]:
    """Return a line for each failed point: its number, its error and its folder."""
    lines = []
    for point in points:
        outcome = point.outcome()
        if outcome is not None and outcome.state == FAILED:
            lines.append(f"point {point.number} failed: {outcome.error} ({point.folder})")
    return lines


def progress(point: Point) -> tuple[str, str, str]:
    """Return the state, step and held-out result of a point, as table cells."""
    outcome = point.outcome()
    if outcome is not None:
        return outcome.state, "", "" if outcome.value is None else f"{outcome.value:.4g}"
    seed = next((s for s in point.sweep.seeds if not point.is_finished(s)), None)
    if point.keys() is None or seed is None:
        return "waiting", "", ""
    held_out = point.latest_value(seed)
    return f"seed {seed}", last_step(point, seed), "" if held_out is None else f"{held_out:.4g}"


def last_step(point: Point, seed: int) -> str:
    """Return the last step in a run's metrics."""
    path = point.run_dir(seed) / "metrics.jsonl"
    if not path.exists():
        return "starting"
    with path.open("rb") as file:
        file.seek(max(os.path.getsize(path) - TAIL_BYTES, 0))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        # The last line may be half written, and the seek may have cut the first one.
        try:
            return str(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return ""
