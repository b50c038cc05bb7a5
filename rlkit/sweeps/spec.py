"""The YAML file of a sweep, parsed and checked before anything starts."""

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
RANGE_KEYS = ("low", "high", "step", "log")
RESERVED_KEYS = ("seed", "output_dir", "resume", "overwrite", "config")  # the sweep itself sets these
FINISHED, FAILED, PRUNED = "finished", "failed", "pruned"  # states of a point
MAX_GRID_POINTS = 10_000  # a larger grid is almost certainly a typo
# Fields that may differ when a sweep is resumed: none of them changes what a point measures.
RESUMABLE_FIELDS = ("trials", "seeds", "parallel", "slurm", "output_dir", "accelerate", "num_processes")


@dataclass
class Sweep:
    """A parsed sweep file.

    Attributes:
        base: Config that every run starts from.
        keys: Search space. Maps each key, or part of a key (`environment_args.level`), to its domain: a list
            of values, or a mapping with `low` and `high`, optionally `step`, and `log: true` to sample on a
            log scale.
        trials: Number of points for `random` and `optuna`; a grid determines its own number.
        seeds: Seeds that every point is trained with.
        objective: Name of the reward whose mean over the held-out tasks is compared. None compares the
            environment's metric.
        pruning: With optuna, stop points whose held-out result is below the median of the other points.
        parallel: Maximum number of points that the launchers local and slurm run at a time.
        slurm: Job options: partition, account, qos, time (minutes), nodes, gpus_per_node, cpus_per_task, mem,
            container, setup (shell lines), grace (seconds between the signal and the kill), and any other
            option of sbatch.
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
        """Folder that holds all files of the sweep."""
        return Path(self.output_dir)

    @property
    def size(self) -> int:
        """Number of points."""
        return len(list(self.grid())) if self.search == "grid" else self.trials

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield the keys of each grid point; the last key changes fastest."""
        domains = [grid_values(key, domain) for key, domain in self.keys.items()]
        for values in itertools.product(*domains):
            yield dict(zip(self.keys, values, strict=True))

    def corners(self) -> list[dict[str, Any]]:
        """Return a few points that together cover each listed value and both ends of each range.

        They are parsed before anything starts, so that a bad value does not fail hours later.
        """
        extremes = {}
        for key, domain in self.keys.items():
            extremes[key] = domain if isinstance(domain, list) else [domain["low"], domain["high"]]
        num_points = max(map(len, extremes.values()))
        return [
            {key: values[min(i, len(values) - 1)] for key, values in extremes.items()}
            for i in range(num_points)
        ]

    def identity(self) -> str:
        """Return, as JSON, the fields that must not change when a sweep is resumed."""
        fixed = {key: value for key, value in asdict(self).items() if key not in RESUMABLE_FIELDS}
        return json.dumps(fixed, sort_keys=True)

    def to_argv(self, keys: Mapping[str, Any]) -> list[str]:
        """Return the keys of a point as command-line arguments."""
        argv: list[str] = []
        for key, value in keys.items():
            if "." in key or isinstance(value, dict):
                argv.append(f"--{key}={json.dumps(value)}")
            elif isinstance(value, list):
                argv += [f"--{key}", *map(str, value)]
            else:
                argv.append(f"--{key}={value}")
        return argv


def load_sweep(path: Path) -> Sweep:
    """Load and check a sweep file.

    Raises:
        UserError: If a key is unknown or missing, or a value is invalid.
    """
    content = load_yaml(path)
    valid_keys = [attribute.name for attribute in fields(Sweep)]
    for key in content:
        if key not in valid_keys:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), valid_keys)}")
    for key in ("base", "keys"):
        if not content.get(key):
            raise UserError(f"{path}: the key {key!r} is missing")
    sweep = Sweep(**({"output_dir": f"runs/{path.stem}"} | content))
    sweep.slurm = {str(name).replace("-", "_"): value for name, value in sweep.slurm.items()}
    for key, choices in (("command", COMMANDS), ("search", SEARCHES), ("direction", DIRECTIONS)):
        value = str(getattr(sweep, key))
        if value not in choices:
            raise UserError(f"{path}: unknown {key} {value!r}{nearest(value, choices)}")
    if not find_config(sweep.base).is_file():
        raise UserError(f"{path}: the base config {sweep.base} does not exist")
    _check_numbers(sweep, path)
    for key, domain in sweep.keys.items():
        _check_key(key, domain, path)
    if sweep.search == "grid" and sweep.size > MAX_GRID_POINTS:
        raise UserError(
            f"{path}: the grid has {sweep.size:,} points, more than {MAX_GRID_POINTS:,}; "
            "use `search: random` with `trials`"
        )
    return sweep


def _check_numbers(sweep: Sweep, path: Path) -> None:
    if sweep.search == "grid" and sweep.trials:
        raise UserError(f"{path}: a grid determines its own number of points; remove trials")
    if sweep.search != "grid" and sweep.trials < 1:
        raise UserError(f"{path}: search {sweep.search} needs trials, the number of points")
    if not sweep.seeds or len(set(sweep.seeds)) != len(sweep.seeds):
        raise UserError(f"{path}: seeds must be a non-empty list of distinct integers, not {sweep.seeds}")
    if sweep.pruning and sweep.search != "optuna":
        raise UserError(f"{path}: pruning requires `search: optuna`, not {sweep.search}")
    if sweep.parallel < 1:
        raise UserError(f"{path}: parallel must be at least 1, not {sweep.parallel}")


def _check_key(key: str, domain: object, path: Path) -> None:
    if key.split(".", maxsplit=1)[0] in RESERVED_KEYS:
        remedy = "use seeds" if key == "seed" else "remove it from keys"
        raise UserError(f"{path}: the sweep sets {key} itself; {remedy}")
    if isinstance(domain, list):
        if not domain:
            raise UserError(f"{path}: {key} has an empty list, so the sweep has no points")
        if None in domain or [] in domain:
            raise UserError(f"{path}: {key}: null and [] cannot be passed on a command line")
        return
    if not isinstance(domain, dict):
        raise UserError(f"{path}: {key} must be a list, or a range with low and high, not {domain!r}")
    for name in domain:
        if name not in RANGE_KEYS:
            raise UserError(f"{path}: {key}: unknown {name!r}{nearest(str(name), RANGE_KEYS)}")
    low: Any = domain.get("low")
    high: Any = domain.get("high")
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)):
        # YAML 1.1 reads 1e-5 as a string: its floats need a dot.
        raise UserError(
            f"{path}: {key}: low and high must be numbers, not {low!r} and {high!r} (write 1.0e-5, not 1e-5)"
        )
    if low >= high:
        raise UserError(f"{path}: {key}: low ({low}) must be less than high ({high})")
    if domain.get("log") and (low <= 0 or "step" in domain):
        raise UserError(f"{path}: {key}: a log scale needs low > 0 and no step")


def no_such_objective(objective: str, metric: str, rewards: Iterable[str]) -> str:
    """Return the error message for an objective that is not among the rewards."""
    return (
        f"unknown objective {objective!r}{nearest(objective, rewards)}: "
        f"name one of the rewards, or remove objective to compare the metric, {metric}"
    )


def grid_values(key: str, domain: list[Any] | dict[str, Any]) -> list[Any]:
    """Return the values of a key in a grid; raises UserError for a range without a step."""
    if isinstance(domain, list):
        return domain
    if "step" not in domain:
        raise UserError(f"{key}: a grid needs a list, or a range with a step")
    # 1e-9 absorbs rounding: (0.3 - 0.0) / 0.1 is 2.9999999999999996.
    count = int((domain["high"] - domain["low"]) / domain["step"] + 1e-9) + 1
    values = [domain["low"] + i * domain["step"] for i in range(count)]
    return [round(value, 12) if isinstance(value, float) else value for value in values]
