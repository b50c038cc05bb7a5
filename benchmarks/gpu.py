"""Measure rlkit on one GPU.

    python benchmarks/gpu.py --part smoke            # each part takes at most eight minutes
    python benchmarks/gpu.py --part step --missing   # only what the result does not contain yet
    python benchmarks/gpu.py --cpu                   # all parts with tiny sizes, to try the script

Nothing is downloaded: the models have random weights in the sizes of published ones, and the tokenizer is
built here. benchmarks/gpu_wheels.sh collects the packages that a bare machine lacks. Every case is written to
benchmarks/results/gpu.json as soon as it is measured. A case that fails is written, too, with its error; the
exit code is then 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
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


def describe_machine(on_cpu: bool) -> dict[str, Any]:
    """Return the card, the versions and the commit of a measurement."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or a copy without the history
        output = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True)
        commit = output.stdout.decode().strip()
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
        "date": datetime.date.today().isoformat(),
    }


def run_part(name: str, options: argparse.Namespace) -> bool:
    """Measure the cases of a part, write each to the result, and return whether none failed."""
    import torch
    from gpu_parts.common import Machine, OutOfTimeError

    from rlkit.files import atomic_write

    device = torch.device("cpu" if options.cpu else "cuda")
    deadline = time.monotonic() + 60 * options.minutes
    machine = Machine(device, options.repeats, deadline)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    earlier = results.get(name, {}).get("cases", {}) if options.missing else {}
    part = {"machine": describe_machine(options.cpu), "repeats": options.repeats, "cases": dict(earlier)}
    signal.signal(signal.SIGALRM, _stop)
    succeeded = True
    for case, measure in importlib.import_module(f"gpu_parts.{name}").cases(machine).items():
        if case in earlier and "error" not in earlier[case]:
            continue
        try:
            machine.require_seconds(1)
            # Interrupts a case that outlasts the part, also while it waits for a process.
            signal.alarm(max(int(deadline - time.monotonic()), 1))
            outcome = measure()
        except OutOfTimeError as error:
            outcome = {"error": f"out of time: {error}"}
        except Exception as error:  # the other cases are still worth the time on the GPU
            traceback.print_exc()
            outcome = {"error": f"{type(error).__name__}: {error}"[:500]}
        finally:
            signal.alarm(0)
        succeeded = succeeded and "error" not in outcome
        part["cases"][case] = outcome
        atomic_write(options.out, json.dumps(results | {name: part}, indent=1) + "\n")
        print(f"{name}: {case}: {json.dumps(outcome)}", flush=True)
        machine.free()
    return succeeded


def _stop(*_: object) -> None:
    from gpu_parts.common import OutOfTimeError

    raise OutOfTimeError("the part has used up its time")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {name:10} {what}" for name, what in PARTS.items()),
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, with tiny sizes")
    parser.add_argument("--missing", action="store_true", help="keep the cases that the result contains")
    parser.add_argument("--repeats", type=int, default=3, help="measurements per side (default: 3)")
    parser.add_argument("--minutes", type=float, default=8, help="maximum minutes per part (default: 8)")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file")
    options = parser.parse_args()
    # A bare machine has a copy of the repository but no installed rlkit, in the runs that parts start, too.
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if options.out == RESULT:
            parser.error("--cpu measures nothing worth keeping: give another file with --out")
    import torch

    if not options.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU; --cpu tries the parts with tiny sizes")
    succeeded = [run_part(name, options) for name in options.part]
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    raise SystemExit(main())
