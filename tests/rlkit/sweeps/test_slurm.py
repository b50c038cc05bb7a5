"""Sweeps on a real Slurm of one node: an array of GRPO runs, one killed, one told to leave, and collected."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlkit.commands.sweep import main
from rlkit.errors import UserError
from rlkit.sweeps.point import Point
from rlkit.sweeps.slurm import in_queue, jobs_of, parameters
from rlkit.sweeps.spec import FINISHED, load_sweep
from tests.slurm import Slurm, missing
from tests.waiting import wait_until

KEYS = {"learning_rate": [0.01, 0.02, 0.03]}
SLURM = {"partition": "main", "time": 60, "cpus_per_task": 1, "grace": 60}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if lacks := missing():
        pytest.skip(f"a Slurm of our own needs {', '.join(lacks)}")
    with Slurm(tmp_path_factory.mktemp("slurm")) as slurm, pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        yield slurm


def steps(point):
    path = point.run_dir(0) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return max((line["step"] for line in lines), default=0)


@pytest.mark.slow
def test_an_array_with_a_killed_and_a_requeued_job(cluster, write, capsys):
    """All three points end: who was told to leave went on in the same job, who was killed when asked."""
    path = write(
        changes={"max_steps": 30, "save_steps": 5, "evaluation_tasks": 4}, keys=KEYS, parallel=2, slurm=SLURM
    )
    sweep = load_sweep(path)
    points = [Point(sweep, number) for number in range(3)]
    assert main([str(path), "--launcher", "slurm"]) == 0
    assert "3 points" in capsys.readouterr().out
    jobs = jobs_of(sweep)
    wait_until(lambda: steps(points[0]) >= 6 and steps(points[1]) >= 6)
    cluster.run("scancel", "--signal=KILL", jobs["0"])
    cluster.run("scancel", "--signal=USR2", jobs["1"])  # what Slurm sends before the time is up
    assert main([str(path), "--launcher", "slurm"]) == 0
    wait_until(lambda: points[1].outcome() and points[2].outcome() and not in_queue(sweep))
    assert "stopped by SIGUSR" in (points[1].folder / "seed-0.log").read_text()
    assert jobs_of(sweep)["1"] == jobs["1"]  # it was queued again, not submitted again

    assert points[0].outcome() is None
    capsys.readouterr()
    assert main([str(path), "--launcher", "slurm"]) == 0
    assert "1 points" in capsys.readouterr().out
    wait_until(lambda: points[0].outcome() is not None)
    assert [point.outcome().state for point in points] == [FINISHED] * 3
    assert [point.keys() for point in points] == list(sweep.grid())

    assert main([str(path), "--collect"]) == 0
    with (sweep.folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(float(row["learning_rate"]) for row in rows) == KEYS["learning_rate"]
    assert all(row["state"] == FINISHED and row["mean even"] for row in rows)
    wait_until(lambda: not in_queue(sweep))
    assert main([str(path), "--launcher", "slurm"]) == 0
    assert "nothing to submit" in capsys.readouterr().out


@pytest.mark.slow
def test_a_job_of_two_nodes(write, tmp_path):
    """Both tasks of a job, as srun starts them on two nodes: the second starts what the first does, twice."""
    base = {"max_steps": 1, "evaluation_tasks": 2, "per_device_train_batch_size": 4}
    several = {"accelerate": "multinode_zero3", "num_processes": 2, "seeds": [0, 1]}
    path = write(changes=base, keys={"learning_rate": [0.01]}, **several)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n")  # both are this machine
    scontrol.chmod(0o755)
    step = {"SLURM_NNODES": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "a,b", "SLURM_JOB_ID": "77"}
    step |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    code = (
        "import sys; from pathlib import Path; from rlkit.sweeps.spec import load_sweep;"
        "from rlkit.sweeps.slurm import Job; Job(load_sweep(Path(sys.argv[1])), 0)()"
    )
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)], env=os.environ | step | {"SLURM_NODEID": rank}
        )
        for rank in ("1", "0")
    ]
    assert [task.wait(400) for task in tasks] == [0, 0]
    point = Point(load_sweep(path), 0)
    outcome = point.outcome()
    assert outcome is not None and outcome.state == FINISHED, outcome
    assert set(outcome.values) == {"0", "1"}
    assert (point.folder / "seed-1.node-1.log").exists()


@pytest.mark.parametrize(
    "slurm, complaint",
    [
        ({"partition": "man"}, "there is no partition 'man' .did you mean 'main'"),
        ({"partition": "main", "gres": "gpu:1"}, "Slurm refused the sweep: .*[Gg]eneric resource|gres"),
    ],
)
def test_what_slurm_does_not_have(cluster, write, slurm, complaint):
    path = write(keys=KEYS, slurm=slurm)
    with pytest.raises(UserError, match=complaint) as caught:
        main([str(path), "--launcher", "slurm"])
    assert "\n" not in str(caught.value)
    assert not cluster.run("squeue", "-h")


def test_a_slurm_that_does_not_answer(cluster, write, monkeypatch, tmp_path):
    text = Path(os.environ["SLURM_CONF"]).read_text()
    other = tmp_path / "slurm.conf"
    port = next(line for line in text.splitlines() if line.startswith("SlurmctldPort"))
    other.write_text(text.replace(port, "SlurmctldPort=1") + "MessageTimeout=2\nSlurmctldTimeout=2\n")
    monkeypatch.setenv("SLURM_CONF", str(other))
    with pytest.raises(UserError, match="Slurm does not answer"):
        main([str(write(keys=KEYS, slurm=SLURM)), "--launcher", "slurm"])


def test_no_slurm(write, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no Slurm here"):
        main([str(write(keys=KEYS, slurm=SLURM)), "--launcher", "slurm"])


def test_options_reach_sbatch(write):
    pytest.importorskip("submitit")
    slurm = SLURM | {
        "account": "us",
        "nodes": 2,
        "gpus_per_node": 8,
        "container": "a.sqsh",
        "mail-user": "me",
    }
    found = parameters(load_sweep(write(keys=KEYS, parallel=5, slurm=slurm | {"setup": "module load cuda"})))
    assert found["partition"] == "main" and found["account"] == "us" and found["time"] == 60
    assert found["nodes"] == 2 and found["ntasks_per_node"] == 1 and found["gpus_per_node"] == 8
    assert found["signal_delay_s"] == 60 and found["array_parallelism"] == 5
    assert found["setup"] == ["module load cuda"]
    assert "--container-image=a.sqsh" in found["srun_args"]
    assert found["additional_parameters"] == {"mail-user": "me"}
