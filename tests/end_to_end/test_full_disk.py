"""A disk that is full or read-only ends a run with one line, and the run can be resumed."""

import ctypes
import os
import resource
from functools import partial

import pytest

from rlkit.runs.checkpoints import last_checkpoint
from tests.end_to_end.killing import Run
from tests.quick import QUICK, ROOT, TOY

KEYS = QUICK | {"num_tasks": 12, "evaluation_tasks": 2, "max_steps": 2, "save_steps": 1}
TRAIN = {
    "environment": f"{TOY}:Odd",
    "max_completion_length": 6,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
}
KEYS_BY_STAGE = {
    "train": KEYS | TRAIN,
    "sft": KEYS | {"environment": f"{TOY}:Odd", "demonstrations": "answer", "per_device_train_batch_size": 4},
    "rank": KEYS
    | {
        "environment": f"{ROOT / 'tests' / 'toy_ranking.py'}:Echo",
        "per_device_train_batch_size": 4,
        "adapter_rank": 2,
    },
}
# Part of the path of the file that cannot be written, and the last complete checkpoint by then.
FILES = {
    "config.yaml": None,
    "evaluation/before.json": None,
    "metrics.jsonl": None,
    "checkpoint-1/config.json": None,
    "checkpoint-2/model.safetensors": 1,
    "checkpoint-2/optimizer.pt": 1,
    "checkpoint-2/scheduler.pt": 1,
    "checkpoint-2/trainer_state.json": 1,
    "checkpoint-2/rlkit_state_0.pt": 1,
    "checkpoint-2/rlkit.json": 1,
    "evaluation/after.json": 2,
    "model.partial/model.safetensors": 2,
    "report.html": 2,
}
CASES = [("train", file) for file in FILES] + [
    ("sft", "checkpoint-2/model.safetensors"),
    ("rank", "checkpoint-2/model.safetensors"),
    ("rank", "first_stage/before.json"),
    ("rank", "model.partial"),
]
WRITES = ("open", "os.mkdir", "torch.save", "save_file")
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, CLONE_NEWNS = 1, 32, 4096, 16384, 1 << 18, 0x20000


def fill_disk():
    """Let every write to a file fail. Python ignores the signal that the limit also sends."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def make_read_only(folder):
    """Make a folder read-only for this process, also for root."""
    call = ctypes.CDLL(None, use_errno=True)
    steps = [
        call.unshare(CLONE_NEWNS),
        call.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        call.mount(bytes(folder), bytes(folder), None, MS_BIND, None),
        call.mount(b"none", bytes(folder), None, MS_REMOUNT | MS_BIND | MS_RDONLY, None),
    ]
    assert steps == [0] * 4, os.strerror(ctypes.get_errno())


def fail_at(run, part, fail):
    """Return a function that calls `fail` before the first operation on a path that contains `part`."""
    is_failing = False

    def call(kind, path):
        nonlocal is_failing
        if part in path and not is_failing and kind in WRITES:
            is_failing = True
            fail()

    return partial(run.operations.install, call)


def assert_one_line(output, *parts):
    assert "Traceback" not in output
    line = output.strip().splitlines()[-1]
    assert line.startswith("rlkit: cannot write"), output[-2000:]
    assert all(part in line for part in parts), line


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "file"), CASES)
def test_full_disk_ends_a_run_with_one_line_and_it_can_be_resumed(tmp_path, models, stage, file):
    run = Run(tmp_path, "run", stage, KEYS_BY_STAGE[stage] | {"model_name_or_path": models[stage]})
    code = run(fail_at(run, file, fill_disk))
    output = run.log.read_text()
    assert code == 2, output[-3000:]
    assert_one_line(output, str(run.path), "free disk space")
    checkpoint = last_checkpoint(run.path) if run.path.exists() else None
    assert (checkpoint and checkpoint.name) == (
        FILES.get(file) and f"checkpoint-{FILES[file]}"
    ) or stage != "train"
    assert not (run.path / "model").exists() or file == "report.html"
    assert run(lambda: None) == 0, run.log.read_text()[-3000:]
    assert (
        (run.path / "report.html").exists() and (run.path / "model" / "config.json").exists()
    ) or stage == "rank"
    assert not list(run.path.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a folder read-only")
@pytest.mark.parametrize("part", ["checkpoint-2/model", "checkpoint-2/optimizer.pt", "model.partial"])
def test_disk_that_becomes_read_only_ends_a_run_with_one_line(tmp_path, models, part):
    run = Run(tmp_path, "run", "train", KEYS_BY_STAGE["train"] | {"model_name_or_path": models["train"]})
    assert run(fail_at(run, part, lambda: make_read_only(run.path))) == 2, run.log.read_text()[-3000:]
    assert_one_line(run.log.read_text(), str(run.path), "make the folder writable")
    assert last_checkpoint(run.path) is not None
    assert run(lambda: make_read_only(run.path)) == 2
    assert (
        "Traceback" not in run.log.read_text() and "is not writable" in run.log.read_text().splitlines()[-1]
    )
    assert run(lambda: None) == 0, run.log.read_text()[-3000:]
