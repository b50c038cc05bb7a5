"""Run directories: no run overwrites another by accident, and rollouts are written in the background."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest

from rlkit.errors import UserError
from rlkit.runs.directory import MAX_PENDING_WRITES, RunDirectory, write_errors
from rlkit.runs.launch import check_start
from tests.interrupting import interrupt_after


@pytest.fixture
def run(tmp_path, open_run):
    return open_run(tmp_path / "run")


@pytest.fixture
def existing_run(run):
    (run.path / "config.yaml").write_text("a: 1\n")
    (run.path / "rollouts" / "old.parquet").touch()
    return run


def test_open_rejects_an_existing_run(existing_run):
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        existing_run.open(resume=False, overwrite=False)
    assert (existing_run.path / "rollouts" / "old.parquet").exists()


def test_open_accepts_empty_folders(run):
    run.open(resume=False, overwrite=False)
    assert (run.path / "rollouts").is_dir() and (run.path / "evaluation").is_dir()


def test_open_keeps_files_to_resume_and_deletes_them_to_overwrite(existing_run):
    existing_run.open(resume=True, overwrite=False)
    assert (existing_run.path / "rollouts" / "old.parquet").exists()
    existing_run.open(resume=False, overwrite=True)
    assert not (existing_run.path / "config.yaml").exists()
    assert list((existing_run.path / "rollouts").iterdir()) == []


def test_check_rejects_a_folder_in_which_even_root_cannot_create_files():
    with pytest.raises(
        UserError, match=r"cannot create the run directory /proc/run: /proc is not writable \("
    ):
        RunDirectory(Path("/proc/run"), "train").check(resume=False, overwrite=False)


def test_open_rejects_resume_with_overwrite(existing_run):
    with pytest.raises(UserError, match="not both"):
        existing_run.open(resume=True, overwrite=True)


def test_overwrite_rejects_a_folder_without_config(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory(tmp_path, "train").open(resume=False, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


OPEN = [{"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}]
KEYS = {"environment": "causal-v1", "model_name_or_path": "bundled:smollm2-135m"}


@pytest.mark.parametrize("options", OPEN)
@pytest.mark.parametrize("number", range(6))
def test_interrupted_overwrite_is_completed_by_the_next_start(existing_run, monkeypatch, options, number):
    """The rest of the old run must not be resumed, nor block the folder."""
    path = existing_run.path
    (path / "checkpoint-1").mkdir()
    for name in ("checkpoint-1/rlkit.json", "checkpoint-1/model", "metrics.jsonl"):
        (path / name).write_text("{}")
    interrupt_after(monkeypatch, number, "unlink", "rmdir")
    with pytest.raises(KeyboardInterrupt):
        existing_run.open(resume=False, overwrite=True)
    monkeypatch.undo()
    check_start("train", [], KEYS | {"output_dir": str(path)} | options)
    existing_run.open(**options)
    assert sorted(entry.name for entry in path.iterdir()) == [".lock", "evaluation", "rollouts"]
    assert not existing_run.is_used()


def test_run_killed_while_it_writes_its_config_can_be_started_again(run):
    """Without --resume: a sweep adds it only to runs that have a config."""
    (run.path / "config.yaml.123.partial").write_text("a: ")
    check_start("train", [], KEYS | {"output_dir": str(run.path)})
    run.open(resume=False, overwrite=False)
    run.save_config("a: 1\n")
    assert run.is_used()


@pytest.mark.parametrize("options", OPEN)
def test_open_rejects_a_run_locked_by_another_process(existing_run, options):
    """The lock is released when the process dies, even if a child that it forked survives."""
    existing_run.close()
    program = (
        "import os, sys, time; from pathlib import Path; from rlkit.runs.directory import RunDirectory;"
        "run = RunDirectory(Path(sys.argv[1]), 'train'); run.open(resume=True, overwrite=False);"
        "child = os.fork(); print(child, flush=True) if child else None; time.sleep(100)"
    )
    command = [sys.executable, "-c", program, str(existing_run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        with pytest.raises(UserError, match=rf"^process {process.pid} on .* is writing to"):
            existing_run.open(**options)
        assert (existing_run.path / "rollouts" / "old.parquet").exists()
        process.kill()
        process.wait()
        existing_run.open(**options)
        os.kill(child, signal.SIGKILL)
    assert existing_run.path.joinpath("config.yaml").exists() == options["resume"]


def test_close_releases_the_lock(existing_run):
    existing_run.open(resume=True, overwrite=False)
    program = (
        "import sys; from pathlib import Path; from rlkit.runs.directory import RunDirectory;"
        "RunDirectory(Path(sys.argv[1]), 'train').open(resume=True, overwrite=False)"
    )
    command = [sys.executable, "-c", program, str(existing_run.path)]
    rejected = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rejected.returncode != 0 and f"process {os.getpid()} on" in rejected.stderr
    existing_run.close()
    subprocess.run(command, check=True)


def test_rewind_deletes_later_files_and_metrics(run):
    for step in (1, 2, 3):
        run.log(step, {"reward": step})
        run.save_rollouts(step, [{"a": step}])
        (run.path / "evaluation" / f"step-{step}.json").touch()
    (run.path / "rollouts" / "step-000004.partial").touch()
    foreign = [run.path / "rollouts" / "step-best.parquet", run.path / "evaluation" / "step-3-copy.json"]
    for path in foreign:
        path.touch()
    RunDirectory(run.path, "sft").log(7, {"loss": 1.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    run.rewind(2)
    for path in foreign:
        path.unlink()  # kept
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("sft", 7)]
    assert sorted(p.name for p in (run.path / "rollouts").iterdir()) == [
        f"step-00000{i}.parquet" for i in (1, 2)
    ]
    assert sorted(p.name for p in (run.path / "evaluation").iterdir()) == ["step-1.json", "step-2.json"]


def test_rewind_deletes_what_a_killed_run_did_not_log(run):
    """A result is saved before it is logged; the one after training is always computed again."""
    run.log(0, {"first_stage/ndcg@10": 0.5})
    run.log(2, {"evaluation/even": 0.5})
    run.log(2, {"reward": 1.0})
    run.log(4, {"reward": 1.0})
    num_metrics = run.num_metrics()
    run.log(4, {"evaluation/even": 0.5})
    names = ("evaluation/before", "evaluation/step-2", "evaluation/step-4", "evaluation/after")
    for name in (*names, "first_stage/before", "first_stage/after"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / f"{name}.json").write_text("{}")
    (run.path / "model.partial").mkdir()
    (run.path / "evaluation" / "step-4.json.7.partial").touch()
    run.rewind(4, num_metrics)
    assert run.num_metrics() == num_metrics
    assert sorted(path.stem for path in (run.path / "evaluation").iterdir()) == ["step-2"]
    assert sorted(path.stem for path in (run.path / "first_stage").iterdir()) == ["before"]
    assert not (run.path / "model.partial").exists()


@pytest.mark.parametrize("rest", [b'{"step": 4, "rew', b"\x00" * 50, b"\xff\xfe{", b"12", b'{"a": 1}'])
def test_rewind_drops_a_damaged_last_line(run, rest):
    run.log(1, {"reward": 1.0})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(rest)
    run.rewind(4)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


def test_rewind_deletes_partial_links_but_not_their_targets(run, tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    for path, to in (("x.partial", tmp_path / "gone"), ("rollouts/y.partial", target)):
        (run.path / path).symlink_to(to)
    run.rewind(0)
    assert not list(run.path.rglob("*.partial")) and target.is_dir()


@pytest.mark.parametrize("num_left", [0, 1, None])
def test_rewind_warns_of_metrics_that_were_deleted(run, num_left, caplog):
    run.log(1, {"reward": 1.0})
    run.log(2, {"reward": 2.0})
    path = run.path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.unlink() if num_left is None else path.write_text("".join(lines[:num_left]))
    run.rewind(2, num_metrics=2)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{path} has {num_left or 0} of the 2 lines that it had when")
    caplog.clear()
    path.write_text("".join(lines))
    run.rewind(2, num_metrics=2)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["rollouts", "evaluation"])
def test_open_names_a_file_in_the_place_of_a_folder(tmp_path, name):
    (tmp_path / "config.yaml").touch()
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"cannot write .*/{name}: File exists; move it out of the way"):
        RunDirectory(tmp_path, "train").open(resume=True, overwrite=False)


def test_write_errors_names_a_folder_in_the_place_of_a_file(run):
    (run.path / "metrics.jsonl").mkdir()
    message = r"cannot write .*metrics\.jsonl: Is a directory; .*: move it out of the way, then resume"
    with pytest.raises(UserError, match=message), write_errors(run.path):
        run.rewind(1)


def test_rewind_continues_the_clock(run):
    run.start_time -= 100.0
    run.log(1, {"reward": 1})
    resumed = RunDirectory(run.path, "train")
    resumed.rewind(1)
    resumed.log(2, {"reward": 2})
    seconds = [json.loads(line)["seconds"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert 100 <= seconds[0] <= seconds[1] < 200


def test_log_writes_lines_of_valid_json(run):
    run.log(1, {"loss": math.nan, "reward": 0.5, "lr": math.inf, "note": "x", "none": None, "done": True})
    run.log(2, {"reward": pd.Series([1.0])[0]})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run.path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in text)
    assert first | {"seconds": 0} == {
        **{"step": 1, "stage": "train", "seconds": 0, "loss": None, "reward": 0.5, "lr": None},
        **{"note": "x", "none": None, "done": True},
    }
    assert (second["step"], second["reward"]) == (2, 1.0)


def test_save_rollouts_appends_to_the_same_step(run):
    run.save_rollouts(3, [{"a": 1}, {"a": 2}])
    run.save_rollouts(3, [{"a": 5}])
    run.flush()
    files = list((run.path / "rollouts").iterdir())
    assert [file.name for file in files] == ["step-000003.parquet"]
    assert pd.read_parquet(files[0])["a"].tolist() == [1, 2, 5]


def test_save_rollouts_replaces_a_rewound_step(run):
    run.save_rollouts(3, [{"a": 1}])
    run.rewind(2)
    run.save_rollouts(3, [{"a": 5}])
    run.flush()
    assert saved(run, 3) == [{"a": 5}]


def saved(run, step):
    return pq.read_table(run.path / "rollouts" / f"step-{step:06d}.parquet").to_pylist()


def test_save_rollouts_keeps_the_order_of_many_calls(run):
    rows = [{"a": (7 * i) % 13, "text": str(i)} for i in range(40)]
    for row in rows:
        run.save_rollouts(1, [row])
    run.flush()
    assert saved(run, 1) == rows


def test_save_rollouts_preserves_nested_rows(run):
    turns = [
        {"role": "assistant", "content": "<search>x</search>", "tokens": 5},
        {"role": "user", "content": "nothing found", "tokens": 2},
    ]
    rows = [
        {"task_id": "a", "turns": turns, "log_prob_gap": 0.01, "invalid": None},
        {"task_id": "b", "turns": turns[:1], "log_prob_gap": None, "invalid": "no backend"},
        {"task_id": "c", "turns": [], "log_prob_gap": 0.5, "invalid": None},
    ]
    run.save_rollouts(1, rows)
    run.flush()
    assert saved(run, 1) == rows


@pytest.fixture
def slow_disk(monkeypatch):
    """Block all writes until the event that the fixture yields is set."""
    ready, write = threading.Event(), pd.DataFrame.to_parquet

    def wait(*args, **kwargs):
        assert ready.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", wait)
    yield ready
    ready.set()


def test_save_rollouts_blocks_only_with_too_many_pending_writes(run, slow_disk):
    for step in range(1, MAX_PENDING_WRITES + 1):
        run.save_rollouts(step, [{"a": step}])
    assert list((run.path / "rollouts").glob("*.parquet")) == []
    writer = threading.Thread(target=run.save_rollouts, args=(MAX_PENDING_WRITES + 1, [{"a": 0}]))
    writer.start()
    writer.join(0.2)
    assert writer.is_alive()
    slow_disk.set()
    writer.join(30)
    run.flush()
    assert len(list((run.path / "rollouts").glob("*.parquet"))) == MAX_PENDING_WRITES + 1


def test_rewind_waits_for_pending_writes(run, slow_disk):
    for step in (1, 2, 3):
        run.save_rollouts(step, [{"a": step}])
    slow_disk.set()
    run.rewind(2)
    run.flush()
    assert sorted(p.name for p in (run.path / "rollouts").iterdir()) == [
        f"step-00000{i}.parquet" for i in (1, 2)
    ]


@pytest.fixture
def full_disk(run):
    """Make the disk full for the rollouts of step 1."""
    (run.path / "rollouts" / "step-000001.partial").symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.usefixtures("full_disk")
class TestFullDisk:
    def test_flush_raises_and_later_writes_succeed(self, run):
        run.save_rollouts(1, [{"a": 1}])
        with pytest.raises(UserError, match=r"step 1 .*step-000001\.parquet: .*No space left"):
            run.flush()
        run.save_rollouts(2, [{"a": 2}])
        run.flush()
        assert saved(run, 2) == [{"a": 2}]

    def test_save_rollouts_raises_the_error_of_an_earlier_write(self, run):
        run.save_rollouts(1, [{"a": 1}])
        run._pending[0].exception(30)
        with pytest.raises(UserError, match="No space left"):
            run.save_rollouts(2, [{"a": 2}])
        run.flush()
        assert saved(run, 2) == [{"a": 2}]

    def test_exit_raises_the_error_of_a_pending_write(self, run):
        with pytest.raises(UserError, match="No space left"), run:
            run.save_rollouts(1, [{"a": 1}])

    def test_exit_logs_a_failed_write_if_training_failed(self, run, caplog):
        with pytest.raises(KeyError), run:
            run.save_rollouts(2, [{"a": 2}])
            run.save_rollouts(1, [{"a": 1}])
            raise KeyError
        assert "No space left" in caplog.text
        assert saved(run, 2) == [{"a": 2}]


def test_flush_raises_for_rows_that_parquet_cannot_store(run):
    run.save_rollouts(1, [{"mixed": 1}, {"mixed": [2]}])
    with pytest.raises(Exception, match="mixed"):
        run.flush()


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "raise KeyError"])
def test_exiting_process_completes_pending_writes(run, end):
    program = f"""
from pathlib import Path
from rlkit.runs.directory import RunDirectory
run = RunDirectory(Path({str(run.path)!r}), "train")
for step in range(1, 4):
    run.save_rollouts(step, [{{"a": step}}])
{end}"""
    subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, timeout=60)
    assert [saved(run, step) for step in (1, 2, 3)] == [[{"a": step}] for step in (1, 2, 3)]


@pytest.fixture
def save(run):
    """Return a function that seals the checkpoint of step 1, as transformers does after writing one."""
    from rlkit.training.resume import CheckpointCallback

    args = SimpleNamespace(save_total_limit=None)
    accelerator = SimpleNamespace(is_main_process=True, process_index=0, wait_for_everyone=lambda: None)
    callback = CheckpointCallback(SimpleNamespace(args=args, accelerator=accelerator), {}, run, {})
    (run.path / "checkpoint-1").mkdir()
    state = SimpleNamespace(global_step=1, best_model_checkpoint=None)
    return lambda: callback.on_save(args, state, None)


def test_sealed_checkpoint_has_its_rollouts_on_disk(run, save, slow_disk):
    run.save_rollouts(1, [{"a": 1}])
    threading.Timer(0.2, slow_disk.set).start()
    save()
    assert saved(run, 1) == [{"a": 1}]
    assert (run.path / "checkpoint-1" / "rlkit.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.usefixtures("full_disk")
def test_checkpoint_without_its_rollouts_is_not_sealed(run, save):
    run.save_rollouts(1, [{"a": 1}])
    with pytest.raises(UserError, match="No space left"):
        save()
    assert not (run.path / "checkpoint-1" / "rlkit.json").exists()


def test_name_that_is_too_long_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"output_dir cannot be a folder \(File name too long\): "):
        RunDirectory(tmp_path / ("x" * 300), "train").check(resume=False, overwrite=False)
