"""What a sweep's YAML file says, checked before anything starts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rlkit.errors import UserError, nearest
from rlkit.registry import find_config, load_yaml

COMMANDS = ("train", "sft", "rank")
SEARCHES = ("grid", "random", "optuna")
DIRECTIONS = ("maximize", "minimize")
RANGE = ("low", "high", "step", "log")
OWN_KEYS = ("seed", "output_dir", "resume", "overwrite", "config")  # what a sweep sets itself
FINISHED, FAILED, PRUNED = "finished", "failed", "pruned"  # states of a point
MOST = 10_000  # points of a grid: more is a slip


@dataclass
class Sweep:
    """A sweep as its file says it.

    Attributes:
        base: the config of which runs are made.
        keys: for each key, or part of one (`environment_args.level`), a list of values, or a range: a
            mapping with low and high, step if wanted, and `log: true` for equal chances on a log scale.
        trials: points of `random` and `optuna`; a grid has as many as there are.
        seeds: each point is trained with each.
        objective: name of the reward whose mean over the held-out tasks is compared; None: the
            environment's metric.
        pruning: with optuna, stop points whose held-out result is below the median of the others.
        parallel: points at a time, of the launchers local and slurm.
        slurm: partition, account, qos, time (minutes), nodes, gpus_per_node, cpus_per_task, mem, container,
            setup (shell lines), grace (seconds between signal and kill), and further sbatch options.
    """

    base: str
    keys: dict[str, Any]
    command: str = "train"
    search: str = "grid"
    trials: int = 0
    seeds: list[int] = field(default_factory=lambda: [0])
    objective: str | None = None
    direction: str = "maximize"
    pruning: bool = False
    sampler_seed: int = 0
    accelerate: str | None = None
    num_processes: int | None = None
    parallel: int = 1
    slurm: dict[str, Any] = field(default_factory=dict)
    output_dir: str = ""

    @property
    def folder(self) -> Path:
        """Where everything of it is kept."""
        return Path(self.output_dir)

    @property
    def size(self) -> int:
        """How many points it has."""
        return len(list(self.grid())) if self.search == "grid" else self.trials

    def grid(self) -> Iterator[dict[str, Any]]:
        """The points of a grid, the last key changing first."""
        for values in itertools.product(*(values_of(key, one) for key, one in self.keys.items())):
            yield dict(zip(self.keys, values, strict=True))

    def corners(self) -> list[dict[str, Any]]:
        """Points that have each value of a list and both ends of each range once: for a check beforehand."""
        ends = {
            key: one if isinstance(one, list) else [one["low"], one["high"]] for key, one in self.keys.items()
        }
        most = max(map(len, ends.values()))
        return [{key: values[min(i, len(values) - 1)] for key, values in ends.items()} for i in range(most)]

    def identity(self) -> str:
        """What may not change when a sweep is continued; more trials, seeds and other places may."""
        free = ("trials", "seeds", "parallel", "slurm", "output_dir", "accelerate", "num_processes")
        kept = {key: value for key, value in asdict(self).items() if key not in free}
        return json.dumps(kept, sort_keys=True)

    def words(self, keys: Mapping[str, Any]) -> list[str]:
        """The command line of a point after the base."""
        words: list[str] = []
        for key, value in keys.items():
            if "." in key or isinstance(value, dict):
                words.append(f"--{key}={json.dumps(value)}")
            elif isinstance(value, list):
                words += [f"--{key}", *map(str, value)]
            else:
                words.append(f"--{key}={value}")
        return words


def load_sweep(path: Path) -> Sweep:
    """Read a sweep's file and check it; raises UserError."""
    text = load_yaml(path)
    known = [one.name for one in fields(Sweep)]
    for key in text:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), known)}")
    for key in ("base", "keys"):
        if not text.get(key):
            raise UserError(f"{path}: {key!r} is missing")
    sweep = Sweep(**({"output_dir": f"runs/{path.stem}"} | text))
    sweep.slurm = {str(name).replace("-", "_"): value for name, value in sweep.slurm.items()}
    for key, choices in (("command", COMMANDS), ("search", SEARCHES), ("direction", DIRECTIONS)):
        value = str(getattr(sweep, key))
        if value not in choices:
            raise UserError(f"{path}: there is no {key} {value!r}{nearest(value, choices)}")
    if not find_config(sweep.base).is_file():
        raise UserError(f"{path}: there is no base {sweep.base}")
    _check_numbers(sweep, path)
    for key, one in sweep.keys.items():
        _check_key(key, one, path)
    if sweep.search == "grid" and sweep.size > MOST:
        raise UserError(f"{path}: the grid has {sweep.size:,} points: take search: random and trials")
    return sweep


def _check_numbers(sweep: Sweep, path: Path) -> None:
    if sweep.search == "grid" and sweep.trials:
        raise UserError(f"{path}: a grid has as many points as there are: leave out trials")
    if sweep.search != "grid" and sweep.trials < 1:
        raise UserError(f"{path}: search {sweep.search} needs trials, the number of points")
    if not sweep.seeds or len(set(sweep.seeds)) != len(sweep.seeds):
        raise UserError(f"{path}: seeds must be different whole numbers, not {sweep.seeds}")
    if sweep.pruning and sweep.search != "optuna":
        raise UserError(f"{path}: pruning goes with search: optuna")
    if sweep.parallel < 1:
        raise UserError(f"{path}: parallel must be at least 1")


def _check_key(key: str, one: object, path: Path) -> None:
    if key.split(".", maxsplit=1)[0] in OWN_KEYS:
        raise UserError(
            f"{path}: {key} is set by the sweep itself" + (": use seeds" if key == "seed" else "")
        )
    if isinstance(one, list):
        if not one:
            raise UserError(f"{path}: {key} has an empty list: the sweep has no points")
        if None in one or [] in one:
            raise UserError(f"{path}: {key}: null and [] cannot be said on a command line")
        return
    if not isinstance(one, dict):
        raise UserError(f"{path}: {key} must be a list, or a range with low and high, not {one!r}")
    for name in one:
        if name not in RANGE:
            raise UserError(f"{path}: {key}: unknown {name!r}{nearest(str(name), RANGE)}")
    low: Any = one.get("low")
    high: Any = one.get("high")
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)):
        raise UserError(
            f"{path}: {key} needs numbers for low and high (write 1.0e-5, not 1e-5), not {low!r}, {high!r}"
        )
    if low >= high:
        raise UserError(f"{path}: {key}: low {low} is not below high {high}")
    if one.get("log") and (low <= 0 or "step" in one):
        raise UserError(f"{path}: {key}: a log scale needs low above 0, and no step")


def no_such_objective(objective: str, metric: str, rewards: Iterable[str]) -> str:
    """Return the message about an objective that is not among the rewards."""
    return (
        f"there is no reward {objective!r} to compare{nearest(objective, rewards)}: "
        f"name another, or leave out objective to compare the metric, {metric}"
    )


def values_of(key: str, one: list[Any] | dict[str, Any]) -> list[Any]:
    """The values of a key in a grid; raises UserError where a range has no step."""
    if isinstance(one, list):
        return one
    if "step" not in one:
        raise UserError(f"{key}: a grid needs a list, or a range with a step")
    count = int((one["high"] - one["low"]) / one["step"] + 1e-9) + 1
    values = [one["low"] + i * one["step"] for i in range(count)]
    return [round(value, 12) if isinstance(value, float) else value for value in values]
