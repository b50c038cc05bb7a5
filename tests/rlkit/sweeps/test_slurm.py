"""Sweeps on a real one-node Slurm cluster: a job array of GRPO runs, one killed and one preempted."""

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
from rlkit.sweeps.slurm import in_queue, jobs_of, submitit_parameters
from rlkit.sweeps.spec import FINISHED, load_sweep
from tests.slurm import Slurm, missing_requirements
from tests.waiting import wait_until

KEYS = {"learning_rate": [0.01, 0.02, 0.03]}
SLURM = {"partition": "main", "time": 60, "cpus_per_task": 1, "grace": 60}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if requirements := missing_requirements():
        pytest.skip(f"a local Slurm cluster needs {', '.join(requirements)}")
    with Slurm(tmp_path_factory.mktemp("slurm")) as slurm, pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        yield slurm


def steps(point):
    path = point.run_dir(0) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return max((line["step"] for line in lines), default=0)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_array_survives_a_killed_and_a_preempted_job(cluster, write, capsys):
    """All points finish: the preempted job is requeued, the killed one is submitted again by the command."""
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
    cluster.run("scancel", "--signal=USR2", jobs["1"])  # Slurm sends this signal before a timeout
    assert main([str(path), "--launcher", "slurm"]) == 0
    wait_until(lambda: points[1].outcome() and points[2].outcome() and not in_queue(sweep))
    assert "stopped by SIGUSR" in (points[1].folder / "seed-0.log").read_text()
    assert jobs_of(sweep)["1"] == jobs["1"]  # the job was requeued, not submitted again

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
@pytest.mark.usefixtures("forked_commands")
def test_second_node_starts_the_commands_of_the_first(write, tmp_path):
    """Both tasks of a job, as srun starts them on two nodes, with two seeds."""
    base = {"max_steps": 1, "evaluation_tasks": 2, "per_device_train_batch_size": 4}
    multi_node = {"accelerate": "multinode_zero3", "num_processes": 2, "seeds": [0, 1]}
    path = write(changes=base, keys={"learning_rate": [0.01]}, **multi_node)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n")  # both nodes are this machine
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
        ({"partition": "man"}, "unknown Slurm partition 'man' .did you mean 'main'"),
        ({"partition": "main", "gres": "gpu:1"}, "Slurm rejected the sweep: .*[Gg]eneric resource|gres"),
    ],
)
def test_submit_rejects_missing_partition_and_resource(cluster, write, slurm, complaint):
    path = write(keys=KEYS, slurm=slurm)
    with pytest.raises(UserError, match=complaint) as caught:
        main([str(path), "--launcher", "slurm"])
    assert "\n" not in str(caught.value)
    assert not cluster.run("squeue", "-h")


def test_check_reports_a_slurm_that_does_not_respond(cluster, write, monkeypatch, tmp_path):
    config = Path(os.environ["SLURM_CONF"]).read_text()
    broken = tmp_path / "slurm.conf"
    port = next(line for line in config.splitlines() if line.startswith("SlurmctldPort"))
    broken.write_text(config.replace(port, "SlurmctldPort=1") + "MessageTimeout=2\nSlurmctldTimeout=2\n")
    monkeypatch.setenv("SLURM_CONF", str(broken))
    with pytest.raises(UserError, match="Slurm does not respond"):
        main([str(write(keys=KEYS, slurm=SLURM)), "--launcher", "slurm"])


def test_check_reports_that_slurm_is_not_installed(write, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="Slurm is not installed"):
        main([str(write(keys=KEYS, slurm=SLURM)), "--launcher", "slurm"])


def test_submitit_parameters_pass_all_options_to_sbatch(write):
    pytest.importorskip("submitit")
    slurm = SLURM | {
        "account": "us",
        "nodes": 2,
        "gpus_per_node": 8,
        "container": "a.sqsh",
        "mail-user": "me",
    }
    sweep = load_sweep(write(keys=KEYS, parallel=5, slurm=slurm | {"setup": "module load cuda"}))
    parameters = submitit_parameters(sweep)
    assert parameters["partition"] == "main" and parameters["account"] == "us" and parameters["time"] == 60
    assert parameters["nodes"] == 2 and parameters["ntasks_per_node"] == 1
    assert parameters["gpus_per_node"] == 8
    assert parameters["signal_delay_s"] == 60 and parameters["array_parallelism"] == 5
    assert parameters["setup"] == ["module load cuda"]
    assert "--container-image=a.sqsh" in parameters["srun_args"]
    assert parameters["additional_parameters"] == {"mail-user": "me"}
