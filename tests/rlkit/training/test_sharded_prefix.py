"""One forward is one forward: the shared prefix under DDP and FSDP2, in two real processes."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "sharded_prefix.py"


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_one():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(SCRIPT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = dict(line.split(": ") for line in done.stdout.splitlines() if ": " in line)
    assert set(errors) == {"ddp", "fsdp2", "fsdp2 with checkpointing"}
    assert all(float(value) < 1e-5 for value in errors.values()), errors
