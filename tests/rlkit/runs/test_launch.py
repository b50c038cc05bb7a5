"""`--accelerate`: the command line of accelerate's launcher, on one machine and under srun."""

import os
import subprocess
import sys

import pytest
import yaml

from rlkit.errors import UserError
from rlkit.runs.launch import (
    FOLDER,
    check_start,
    command_line,
    config_file,
    gpus,
    machines,
    split,
    use_one_gpu,
)
from tests.quick import TOY

STEP = {
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[3-4]",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "40123",
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def options_of(line):
    """Return the options of accelerate's launcher, which precede the module."""
    flags = line[3 : line.index("-m", 3)]
    return dict(zip(flags[::2], flags[1::2], strict=True))


def test_split_separates_options_of_the_launcher():
    argv = ["a.yaml", "--accelerate=ddp", "--seed", "1", "--num_processes", "2"]
    assert split(argv) == ({"--accelerate": "ddp", "--num_processes": "2"}, ["a.yaml", "--seed", "1"])
    assert split(["--seed", "1"]) == ({}, ["--seed", "1"])


@pytest.mark.parametrize("argv", [["--accelerate"], ["--accelerate", "--seed"], ["--num_processes", "2"]])
def test_split_rejects_incomplete_options(argv):
    with pytest.raises(UserError, match=r"needs a value|requires --accelerate"):
        split(argv)


@pytest.mark.parametrize("name", ["RANK", "SLURM_NODEID"])
def test_check_start_checks_the_run_directory_on_the_main_process_only(tmp_path, monkeypatch, name):
    """The other ranks start later, when the main process may have created it already."""
    (tmp_path / "config.yaml").touch()
    argv = ["--environment", "causal-v1", "--model_name_or_path", "m", "-o", str(tmp_path)]
    monkeypatch.setenv(name, "1")
    check_start("train", argv)
    with pytest.raises(UserError, match="learning_rate"):
        check_start("train", [*argv, "--learning_rate", "-1"])
    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match="exists: resume it"):
        check_start("train", argv)


def test_config_file_finds_names_and_paths():
    assert {"gpu", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2", "multinode_zero3", "cpu2"} <= set(NAMES)
    assert config_file("zero3") == FOLDER / "zero3.yaml"
    assert config_file("configs/accelerate/ddp.yaml") == FOLDER / "ddp.yaml"
    with pytest.raises(UserError, match=r"no accelerate config 'zro3'.*did you mean 'zero3'"):
        config_file("zro3")
    with pytest.raises(UserError, match=r"there is no file x/y\.yaml"):
        config_file("x/y.yaml")


def test_config_file_finds_names_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file("ddp").is_file()


def test_command_line_starts_one_process_per_gpu():
    line = command_line("train", {"--accelerate": "zero3"}, ["a.yaml", "--seed", "1"], num_gpus=4)
    assert line[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert line[-6:] == ["-m", "rlkit", "train", "a.yaml", "--seed", "1"]
    assert options_of(line)["--num_processes"] == "4"
    line = command_line("train", {"--accelerate": "zero3", "--num_processes": "2"}, [], num_gpus=4)
    assert options_of(line)["--num_processes"] == "2"
    assert "--num_processes" not in options_of(
        command_line("train", {"--accelerate": "cpu2"}, [], num_gpus=0)
    )


@pytest.mark.parametrize(
    ("visible", "names"), [(None, ["0", "1", "2"]), ("4,6,7", ["4", "6", "7"]), ("GPU-a,GPU-b,GPU-c", None)]
)
def test_use_one_gpu_hides_the_others_without_a_launcher(monkeypatch, caplog, visible, names):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it afterwards
        monkeypatch.delenv(name)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    names = names or visible.split(",")
    assert gpus() == names
    monkeypatch.setenv("LOCAL_RANK", "0")
    use_one_gpu()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    monkeypatch.delenv("LOCAL_RANK")
    use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == names[0]
    assert "using 1 of 3 GPUs; use all with --accelerate ddp" in caplog.text


def test_command_line_omits_the_launcher_for_one_process():
    line = command_line("train", {"--accelerate": "gpu"}, ["a.yaml"], num_gpus=1)
    assert line == [sys.executable, "-m", "rlkit", "train", "a.yaml"]


def test_machines_reads_the_srun_step():
    options = machines(STEP, hostnames=lambda nodelist: {"gpu[3-4]": ["gpu3", "gpu4"]}[nodelist])
    assert options["--num_machines"] == "2" and options["--machine_rank"] == "1"
    assert options["--main_process_ip"] == "gpu3" and 1024 < int(options["--main_process_port"]) < 65536
    assert machines({}) == {} == machines(STEP | {"SLURM_STEP_NUM_NODES": "1"})


def test_machines_requires_srun_with_one_task_per_machine():
    with pytest.raises(UserError, match="start the command with srun"):
        machines({"SLURM_NNODES": "2"})
    with pytest.raises(UserError, match=r"16 tasks on 2 nodes.*--ntasks-per-node 1"):
        machines(STEP | {"SLURM_STEP_NUM_TASKS": "16"})


def test_command_line_counts_processes_of_all_machines(monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("rlkit.runs.launch._hostnames", lambda nodelist: ["gpu3", "gpu4"])
    options = options_of(command_line("train", {"--accelerate": "multinode_zero3"}, [], num_gpus=8))
    assert options["--num_processes"] == "16" and options["--num_machines"] == "2"


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_every_config(name):
    """No config sets mixed precision, because the run's `bf16` does; the two must not contradict."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert config.num_processes == content["num_processes"] >= config.num_machines
    assert content.get("mixed_precision", "no") == "no"
    if "zero3" in name:  # otherwise checkpoints contain only shards
        assert content["deepspeed_config"]["zero3_save_16bit_model"] is True
    if "deepspeed_config" in content:
        assert content["deepspeed_config"]["gradient_accumulation_steps"] == "auto"


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_two_machines_train_together(tmp_path, tiny_folder):
    """Start two launchers with one process each, as srun does on two machines."""
    config = {
        "environment": f"{TOY}:Even",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "num_tasks": 8,
        "max_steps": 1,
        "max_completion_length": 4,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "model_name_or_path": tiny_folder,
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n")  # both host names are this machine
    scontrol.chmod(0o755)
    argv = ["train", str(path), "--accelerate", "multinode_zero3", "--num_processes", "2"]
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | STEP | {"SLURM_NODEID": rank}
        environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
        command = [sys.executable, "-m", "rlkit", *argv]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-2000:]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
