"""A run never writes over another by accident."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest

from rlkit.errors import UserError
from rlkit.runs.directory import WAITING, RunDirectory


@pytest.fixture
def run(tmp_path, open_run):
    return open_run(tmp_path / "run")


@pytest.fixture
def used(run):
    (run.path / "config.yaml").write_text("a: 1\n")
    (run.path / "rollouts" / "old.parquet").touch()
    return run


def test_a_run_that_exists_is_not_touched(used):
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        used.open(resume=False, overwrite=False)
    assert (used.path / "rollouts" / "old.parquet").exists()


def test_empty_folders_are_no_run(run):
    run.open(resume=False, overwrite=False)
    assert (run.path / "rollouts").is_dir() and (run.path / "evaluation").is_dir()


def test_resume_keeps_and_overwrite_deletes(used):
    used.open(resume=True, overwrite=False)
    assert (used.path / "rollouts" / "old.parquet").exists()
    used.open(resume=False, overwrite=True)
    assert not (used.path / "config.yaml").exists()
    assert list((used.path / "rollouts").iterdir()) == []


def test_resume_and_overwrite_exclude_each_other(used):
    with pytest.raises(UserError, match="exclude"):
        used.open(resume=True, overwrite=True)


def test_overwrite_deletes_nothing_but_runs(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory(tmp_path, "train").open(resume=False, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    "words", [{"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}]
)
def test_two_processes_do_not_write_to_one(used, words):
    """Until the first one dies, even if what it forked lives on."""
    used.close()
    program = (
        "import os, sys, time; from pathlib import Path; from rlkit.runs.directory import RunDirectory;"
        "run = RunDirectory(Path(sys.argv[1]), 'train'); run.open(resume=True, overwrite=False);"
        "child = os.fork(); print(child, flush=True) if child else None; time.sleep(100)"
    )
    command = [sys.executable, "-c", program, str(used.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        child = int(other.stdout.readline())
        with pytest.raises(UserError, match=rf"^process {other.pid} on .* still writes to"):
            used.open(**words)
        assert (used.path / "rollouts" / "old.parquet").exists()
        other.kill()
        other.wait()
        used.open(**words)
        os.kill(child, signal.SIGKILL)
    assert used.path.joinpath("config.yaml").exists() == words["resume"]


def test_who_closed_it_lets_others_in(used):
    used.open(resume=True, overwrite=False)
    program = (
        "import sys; from pathlib import Path; from rlkit.runs.directory import RunDirectory;"
        "RunDirectory(Path(sys.argv[1]), 'train').open(resume=True, overwrite=False)"
    )
    command = [sys.executable, "-c", program, str(used.path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and f"process {os.getpid()} on" in refused.stderr
    used.close()
    subprocess.run(command, check=True)


def test_rewinding_takes_back_what_came_after(run):
    for step in (1, 2, 3):
        run.log(step, {"reward": step})
        run.save_rollouts(step, [{"a": step}])
        (run.path / "evaluation" / f"step-{step}.json").touch()
    (run.path / "rollouts" / "step-000004.partial").touch()
    other = RunDirectory(run.path, "sft")
    other.log(7, {"loss": 1.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    run.rewind(2)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("sft", 7)]
    assert sorted(p.name for p in (run.path / "rollouts").iterdir()) == [
        f"step-00000{i}.parquet" for i in (1, 2)
    ]
    assert sorted(p.name for p in (run.path / "evaluation").iterdir()) == ["step-1.json", "step-2.json"]


def test_the_clock_goes_on(run):
    run.started -= 100.0
    run.log(1, {"reward": 1})
    again = RunDirectory(run.path, "train")
    again.rewind(1)
    again.log(2, {"reward": 2})
    seconds = [json.loads(line)["seconds"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert 100 <= seconds[0] <= seconds[1] < 200


def test_metrics_are_lines_of_valid_json(run):
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


def test_rollouts_are_added_to_those_of_the_same_step(run):
    run.save_rollouts(3, [{"a": 1}, {"a": 2}])
    run.save_rollouts(3, [{"a": 5}])
    run.flush()
    files = list((run.path / "rollouts").iterdir())
    assert [file.name for file in files] == ["step-000003.parquet"]
    assert pd.read_parquet(files[0])["a"].tolist() == [1, 2, 5]


def test_rollouts_of_a_rewound_step_are_not_added_to(run):
    run.save_rollouts(3, [{"a": 1}])
    run.rewind(2)
    run.save_rollouts(3, [{"a": 5}])
    run.flush()
    assert saved(run, 3) == [{"a": 5}]


def saved(run, step):
    return pq.read_table(run.path / "rollouts" / f"step-{step:06d}.parquet").to_pylist()


def test_rollouts_of_many_generations_of_a_step_keep_their_order(run):
    rows = [{"a": (7 * i) % 13, "text": str(i)} for i in range(40)]
    for row in rows:
        run.save_rollouts(1, [row])
    run.flush()
    assert saved(run, 1) == rows


def test_nested_rows_come_back(run):
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
    """Writing begins with the event that is given."""
    go, write = threading.Event(), pd.DataFrame.to_parquet

    def wait(*args, **kwargs):
        assert go.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", wait)
    yield go
    go.set()


def test_training_does_not_wait_for_the_disk_until_too_much_waits(run, slow_disk):
    for step in range(1, WAITING + 1):
        run.save_rollouts(step, [{"a": step}])
    assert list((run.path / "rollouts").glob("*.parquet")) == []
    more = threading.Thread(target=run.save_rollouts, args=(WAITING + 1, [{"a": 0}]))
    more.start()
    more.join(0.2)
    assert more.is_alive()
    slow_disk.set()
    more.join(30)
    run.flush()
    assert len(list((run.path / "rollouts").glob("*.parquet"))) == WAITING + 1


def test_rewinding_waits_for_what_is_being_written(run, slow_disk):
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
    """There is no room for the rollouts of step 1."""
    (run.path / "rollouts" / "step-000001.partial").symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's device that is always full")
@pytest.mark.usefixtures("full_disk")
class TestFullDisk:
    def test_flush_says_so_and_goes_on(self, run):
        run.save_rollouts(1, [{"a": 1}])
        with pytest.raises(UserError, match=r"step 1 .*step-000001\.parquet: .*No space left"):
            run.flush()
        run.save_rollouts(2, [{"a": 2}])
        run.flush()
        assert saved(run, 2) == [{"a": 2}]

    def test_saving_says_so(self, run):
        run.save_rollouts(1, [{"a": 1}])
        run._waiting[0].exception(30)
        with pytest.raises(UserError, match="No space left"):
            run.save_rollouts(2, [{"a": 2}])
        run.flush()
        assert saved(run, 2) == [{"a": 2}]

    def test_the_end_says_so(self, run):
        with pytest.raises(UserError, match="No space left"), run:
            run.save_rollouts(1, [{"a": 1}])

    def test_it_does_not_hide_what_ended_the_training(self, run, caplog):
        with pytest.raises(KeyError), run:
            run.save_rollouts(2, [{"a": 2}])
            run.save_rollouts(1, [{"a": 1}])
            raise KeyError
        assert "No space left" in caplog.text
        assert saved(run, 2) == [{"a": 2}]


def test_rows_that_cannot_be_written_are_an_error(run):
    run.save_rollouts(1, [{"mixed": 1}, {"mixed": [2]}])
    with pytest.raises(Exception, match="mixed"):
        run.flush()


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "raise KeyError"])
def test_a_process_that_ends_writes_what_waits(run, end):
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
    """Return a function that seals the checkpoint of step 1, as transformers calls it after writing one."""
    from rlkit.training.resume import CheckpointCallback

    args = SimpleNamespace(save_total_limit=None)
    accelerator = SimpleNamespace(is_main_process=True, process_index=0, wait_for_everyone=lambda: None)
    callback = CheckpointCallback(SimpleNamespace(args=args, accelerator=accelerator), {}, run, {})
    (run.path / "checkpoint-1").mkdir()
    state = SimpleNamespace(global_step=1, best_model_checkpoint=None)
    return lambda: callback.on_save(args, state, None)


def test_a_whole_checkpoint_has_its_rollouts_on_the_disk(run, save, slow_disk):
    run.save_rollouts(1, [{"a": 1}])
    threading.Timer(0.2, slow_disk.set).start()
    save()
    assert saved(run, 1) == [{"a": 1}]
    assert (run.path / "checkpoint-1" / "rlkit.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's device that is always full")
@pytest.mark.usefixtures("full_disk")
def test_a_checkpoint_that_lacks_its_rollouts_is_not_whole(run, save):
    run.save_rollouts(1, [{"a": 1}])
    with pytest.raises(UserError, match="No space left"):
        save()
    assert not (run.path / "checkpoint-1" / "rlkit.json").exists()
