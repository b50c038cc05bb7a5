"""A preempted run stops after the current step with a checkpoint and resumes without a difference."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from rlkit.errors import PREEMPTED, Preempted
from rlkit.runs.launch import children_ignore_signals
from rlkit.runs.preemption import PreemptionCallback
from tests.quick import QUICK, ROOT
from tests.waiting import wait_until

KEYS = QUICK | {
    "num_tasks": 20,
    "save_strategy": "steps",
    "save_steps": 1000,
    "max_steps": 40,
    "max_completion_length": 6,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.01,
    "evaluation_tasks": 4,
    "evaluation_steps": 5,
}


class Control:
    should_save = False
    should_training_stop = False


class State:
    is_world_process_zero = True
    global_step = 3
    max_steps = 8


def test_signal_in_training_takes_effect_at_the_end_of_the_step(caplog):
    caplog.set_level(logging.INFO)
    callback, control = PreemptionCallback(), Control()
    with callback.listening():
        callback.on_train_begin(None, None, None)
        callback.on_step_end(None, State, control)
        assert not control.should_save
        os.kill(os.getpid(), signal.SIGUSR1)
        callback.on_step_end(None, State, control)
    assert caplog.messages == ["SIGUSR1 received: writing a checkpoint after step 3"]
    assert control.should_save and control.should_training_stop
    with pytest.raises(Preempted, match="SIGUSR1 after step 3, with a checkpoint"):
        callback.finish_training(State)


def test_signal_in_the_last_step_is_ignored():
    callback, last = PreemptionCallback(), State()
    last.global_step = 8
    with callback.listening():
        callback.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        callback.finish_training(last)
    assert callback.received == "SIGTERM" and not callback.is_training


def test_signal_outside_training_raises_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM outside"), PreemptionCallback().listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_after_the_end_of_a_run_are_ignored():
    callback = PreemptionCallback()
    with callback.listening():
        callback.finish()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
    assert callback.received is None


def test_signal_during_a_checkpoint_stops_after_it():
    callback, control = PreemptionCallback(), Control()
    with callback.listening():
        callback.on_train_begin(None, None, None)
        callback.on_save(None, State, control)
        assert not control.should_training_stop
        os.kill(os.getpid(), signal.SIGTERM)
        callback.on_save(None, State, control)
        assert control.should_training_stop and not control.should_save


def test_children_ignore_user_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        children_ignore_signals()
        code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout == "alive\n"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def command(tmp_path, tiny_folder):
    def command(name, *argv):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump(KEYS | {"model_name_or_path": tiny_folder, "output_dir": str(tmp_path / name)})
        )
        return [sys.executable, "-m", "rlkit", "train", str(path), *argv]

    return command


def steps(run):
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["step"] for line in lines if "reward" in line]


def wait_for_step(run, step, process):
    wait_until(lambda: max(steps(run), default=0) >= step, process=process)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
@pytest.mark.parametrize("argv", [(), ("--accelerate", "cpu2")])
def test_preempted_run_resumes_to_the_same_result(command, tmp_path, argv):
    reference, preempted = tmp_path / "reference", tmp_path / "preempted"
    subprocess.run(command("reference", *argv), cwd=ROOT, check=True, capture_output=True)
    # Like Slurm, signal all processes of a step: also the launcher and the reward workers.
    with subprocess.Popen(
        command("preempted", *argv), cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        wait_for_step(preempted, 4, process)
        os.killpg(process.pid, signal.SIGUSR1)
        error = process.communicate(timeout=100)[1].decode()
    assert "stopped by SIGUSR1 after step" in error and "--resume" in error
    assert process.returncode == (1 if argv else PREEMPTED)  # torchrun exits with 1 on any failure
    last_step = max(steps(preempted))
    assert 4 <= last_step < 40 and (preempted / f"checkpoint-{last_step}" / "rlkit.json").exists()
    subprocess.run(command("preempted", *argv, "--resume"), cwd=ROOT, check=True)
    weights = [load_file(run / "model" / "model.safetensors") for run in (reference, preempted)]
    assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) < 1e-6
    completions = [pd.read_parquet(run / "rollouts")["completion"].tolist() for run in (reference, preempted)]
    assert completions[0] == completions[1]
    evaluations = [
        sorted(path.name for path in (run / "evaluation").iterdir()) for run in (reference, preempted)
    ]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 9


def test_epoch_end_of_a_preempted_run_saves_no_second_checkpoint():
    callback, control = PreemptionCallback(), Control()
    control.should_save = True
    callback.on_epoch_end(None, State, control)
    assert control.should_save  # an ordinary epoch with save_strategy: epoch
    callback.received = "SIGTERM"
    callback.on_epoch_end(None, State, control)
    assert not control.should_save
