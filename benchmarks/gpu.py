"""Measure rlkit on one GPU.

    python benchmarks/gpu.py --part smoke              # each part takes at most eight minutes
    python benchmarks/gpu.py --part step --missing     # only what the result does not contain yet
    python benchmarks/gpu.py --cpu --out cpu.json      # all parts with tiny sizes, to try the script

Nothing is downloaded: the models have random weights in the sizes of published ones, and the tokenizer is
built here. benchmarks/gpu_wheels.sh collects packages for a machine without a network. Every case is written
to benchmarks/results/gpu.json as soon as it is measured. A case that fails is written, too, with its error;
the exit code is then 1.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
PARTS = {
    "smoke": "log-probabilities and gradients with a shared prefix; a run of five steps; resuming",
    "step": "the GRPO step against TRL's trainer",
    "attention": "dense-mask SDPA, FlexAttention and varlen attention for a shared prefix",
    "long": "16k-token rows with gradient checkpointing",
    "generate": "rlkit's transformers engine against transformers' generate",
    "memory": "the forecast of --dry_run against the peak of six runs",
    "rank": "a Plackett-Luce step against sentence-transformers' MultipleNegativesRankingLoss",
}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "triton", "sentence-transformers")


def current_commit() -> str | None:
    """Return the commit of the repository, or None for a copy without the history."""
    git = ["git", "-C", str(ROOT), "rev-parse"]
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        # A copy without the history may be in a folder of another repository.
        if Path(_output([*git, "--show-toplevel"])) == ROOT:
            return _output([*git, "HEAD"])
    return None


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def source_digest() -> str:
    """Return a digest of the Python files: it changes with the code, also in a copy without the history."""
    digest = hashlib.sha256()
    for folder in ("rlkit", "envs", "rewards", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe_machine(on_cpu: bool, commit: str | None) -> dict[str, Any]:
    """Return the card, the versions and the commit of a measurement."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    card = f"{torch.get_num_threads()} CPU threads"
    if not on_cpu:
        properties = torch.cuda.get_device_properties(0)
        card = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return {
        "card": card,
        "platform": platform.machine(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "commit": commit,
        "source": source_digest(),
        "date": datetime.date.today().isoformat(),
    }


def run_part(name: str, part: dict[str, Any], options: argparse.Namespace, results: dict[str, Any]) -> bool:
    """Measure the cases that a part lacks, write each to the result, and return whether none failed.

    Args:
        name: Name of the part.
        part: Entry of the part in the result, from `new_part`; the cases are added.
        options: Options of the command line.
        results: Content of the result file; the part is added.
    """
    import torch
    from gpu_parts.common import Bench, OutOfTime

    deadline = time.monotonic() + 60 * options.minutes
    bench = Bench(torch.device("cpu" if options.cpu else "cuda"), options.repeats, deadline)
    try:
        cases = importlib.import_module(f"gpu_parts.{name}").cases(bench)
    except ModuleNotFoundError as error:
        print(f"{name}: not measured: {error}; see benchmarks/gpu_wheels.sh", file=sys.stderr)
        return False
    results[name] = part
    succeeded = True
    for case, measure in cases.items():
        if case in part["cases"]:
            print(f"{name}: {case}: kept", flush=True)
            continue
        print(f"{name}: {case} ...", file=sys.stderr, flush=True)
        try:
            bench.require_seconds(1)
            # Interrupts a case that outlasts the part, also while it waits for a process.
            signal.alarm(max(int(deadline - time.monotonic()), 1))
            outcome = measure()
        except OutOfTime as error:
            outcome = {"error": f"out of time: {error}"}
        except Exception as error:  # the other cases are still worth the time on the GPU
            traceback.print_exc()
            outcome = {"error": f"{type(error).__name__}: {error}"[:500]}
        finally:
            signal.alarm(0)
        succeeded = succeeded and not has_error(outcome)
        part["cases"][case] = outcome
        save(options.out, results)
        print(f"{name}: {case}: {json.dumps(outcome)}", flush=True)
        bench.free()
    return succeeded


def new_part(
    name: str, machine: dict[str, Any], options: argparse.Namespace, results: dict[str, Any]
) -> dict[str, Any]:
    """Return the entry of a part in the result, with `--missing` including its earlier cases without errors.

    Raises:
        SystemExit: The earlier cases were measured differently, so that the part would mix results.
    """
    part = {"machine": machine, "repeats": options.repeats, "cases": {}}
    if not options.missing or name not in results:
        return part
    now = machine | {"repeats": options.repeats}
    before = results[name]["machine"] | {"repeats": results[name]["repeats"]}
    changed = [key for key in now if key not in ("date", "commit") and now[key] != before.get(key)]
    if changed:
        differences = "; ".join(f"{key} {before.get(key)!r}, now {now[key]!r}" for key in changed)
        raise SystemExit(
            f"gpu.py: error: --missing: {name} was measured with {differences}; "
            "drop --missing to measure all of its cases, or set --out to another file"
        )
    part["cases"] = {
        case: outcome for case, outcome in results[name]["cases"].items() if not has_error(outcome)
    }
    return part


def load(path: Path) -> dict[str, Any]:
    """Return the content of a result file, {} if there is none; raise SystemExit if it is not one."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
        if isinstance(results, dict):
            return results
        reason = "it is not a JSON object"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise SystemExit(
        f"gpu.py: error: cannot read the result file {path}: {reason}; set --out to another file"
    )


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the result file atomically; raise SystemExit if it cannot be written."""
    from rlkit.files import atomic_write

    try:
        atomic_write(path, json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise SystemExit(f"gpu.py: error: cannot write {path}: {error}") from error


def has_error(outcome: Any) -> bool:
    """Return whether a case failed, or one of the sides that it compares."""
    return isinstance(outcome, dict) and ("error" in outcome or any(map(has_error, outcome.values())))


def _out_of_time(*_: object) -> None:
    from gpu_parts.common import OutOfTime

    raise OutOfTime("the part has used up its time")


def _terminate(*_: object) -> None:
    # An exception, so that the runs that a part has started are killed, too.
    raise SystemExit(128 + signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {name:10} {what}" for name, what in PARTS.items()),
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, with tiny sizes")
    parser.add_argument(
        "--missing", action="store_true", help="measure only the cases that the result lacks or that failed"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements per side (default: 3)")
    parser.add_argument("--minutes", type=float, default=8, help="maximum minutes per part (default: 8)")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file")
    parser.add_argument("--commit", help="commit to record if this copy of the repository has no history")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {options.repeats}")
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes must be positive and finite, not {options.minutes:g}")
    options.commit = options.commit or current_commit()
    # Make rlkit importable without installing it, also in the processes that parts start.
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if options.out.resolve() == RESULT:
            parser.error("the numbers of --cpu do not belong in results/gpu.json: set --out to another file")
    import torch

    if not options.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU; --cpu tries the parts with tiny sizes")
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.signal(signal.SIGTERM, _terminate)
    results = load(options.out)
    # An unwritable file and results that must not be mixed are errors now, not after minutes on the GPU.
    save(options.out, results)
    machine = describe_machine(options.cpu, options.commit)
    parts = {name: new_part(name, machine, options, results) for name in options.part}
    succeeded = [run_part(name, part, options, results) for name, part in parts.items()]
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    raise SystemExit(main())
