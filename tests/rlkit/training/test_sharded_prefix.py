"""The shared prefix works under DDP and FSDP2: a test in two processes."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "sharded_prefix.py"


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_gradients_of_two_processes_equal_those_of_one():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(SCRIPT),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    errors = dict(line.split(": ") for line in result.stdout.splitlines() if ": " in line)
    assert set(errors) == {"ddp", "fsdp2", "fsdp2 with checkpointing"}
    assert all(float(value) < 1e-5 for value in errors.values()), errors
