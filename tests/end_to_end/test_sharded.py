"""GRPO, HAPO and SFT in two processes with ZeRO-2, ZeRO-3 and FSDP2 learn the weights of one process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlkit.commands.export import export
from tests.quick import QUICK, ROOT, TOY

KEYS = QUICK | {
    "num_tasks": 20,
    "save_steps": 2,
    "max_steps": 4,
    "max_completion_length": 6,
    "adam_epsilon": 0.1,  # the default would amplify rounding errors in small gradients
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "evaluation_tasks": 6,
    "gradient_checkpointing": False,
}
RUNS = {
    "grpo": ("train", {"num_generations": 4}),
    "hapo": ("train", {"num_generations": 4, "algorithm": "hapo", "beta": 0.0}),
    "sft": ("sft", {"environment": f"{TOY}:Letters", "num_tasks": 32}),  # a multiple of the batch size
}
# Effect of summing float32 gradients in another order, relative to the distance that the weights moved.
TOLERANCE = 1e-3
SHARDS = {  # checkpoint files that only this accelerate config writes
    "cpu2": "optimizer.pt",
    "zero2": "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "zero3": "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt",
    "fsdp2": "pytorch_model_fsdp.bin",
}
# Compares the greedy tokens of vLLM and transformers for the model in a folder.
VLLM_SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
ids = [40, 50, 60, 70] * 3
llm = LLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True)
out = llm.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
for _ in range(20):
    with torch.no_grad():
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
print("same:", list(out[0].outputs[0].token_ids) == ids[12:])
"""
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_commands")]


@pytest.fixture(scope="module")
def launch(tmp_path_factory, vllm_folder):
    """Return a function that trains RUNS[name] in one process, or in two with an accelerate config.

    It returns the run directory.
    """
    folder = tmp_path_factory.mktemp("sharded")

    def launch(name, accelerate=None, *argv, out=None, **keys):
        subcommand, run_keys = RUNS[name]
        run = folder / (out or f"{name}-{accelerate}")
        path = folder / f"{run.name}.yaml"
        batch = {"per_device_train_batch_size": 2 if accelerate else 8, "model_name_or_path": vllm_folder}
        batch |= {"gradient_accumulation_steps": 2 if accelerate else 1}
        path.write_text(yaml.safe_dump(KEYS | batch | run_keys | {"output_dir": str(run)} | keys))
        if accelerate:
            argv = ("--accelerate", accelerate, "--num_processes", "2", *argv)
        command = [sys.executable, "-m", "rlkit", subcommand, str(path), *argv]
        env = os.environ | {"RLKIT_LOG_LEVEL": "debug"}
        process = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert process.returncode == 0, process.stderr[-3000:]
        if subcommand == "train":
            assert "shared_prefix gives the log-probabilities" in process.stderr
        return run

    return launch


@pytest.fixture(scope="module")
def launch_single(launch):
    """Return a function that trains RUNS[name] in one process, once per name."""
    runs = {}

    def launch_single(name):
        if name not in runs:
            runs[name] = launch(name)
        return runs[name]

    return launch_single


def rollouts(run):
    columns = ["step", "task_id", "completion", "reward", "advantage"]
    frame = pd.read_parquet(run / "rollouts")[columns]
    return frame.sort_values(columns[:3], kind="stable").reset_index(drop=True)


def logged(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def distance(a, b):
    return sum((a[key].float() - b[key].float()).norm() ** 2 for key in a) ** 0.5


def assert_same(run, expected, start):
    """Assert that two runs logged and learned the same, and that their weights differ from `start`."""
    if (run / "rollouts").is_dir() and list((run / "rollouts").iterdir()):
        pd.testing.assert_frame_equal(rollouts(run), rollouts(expected), rtol=1e-4, atol=1e-5)
        assert logged(run, "reward") == pytest.approx(logged(expected, "reward"), abs=1e-6)
    assert logged(run, "loss") == pytest.approx(logged(expected, "loss"), abs=1e-4)
    folders = (run, expected)
    scores = [json.loads((path / "evaluation" / "after.json").read_text())["scores"] for path in folders]
    assert scores[0] == scores[1]
    weights = [load_file(path / "model" / "model.safetensors") for path in folders]
    start = load_file(Path(start) / "model.safetensors")
    assert weights[0].keys() == weights[1].keys() == start.keys()
    assert distance(weights[1], start) > 1e-4
    assert distance(*weights) < TOLERANCE * distance(weights[1], start)


def assert_vllm_loads(folder):
    """Assert that vLLM loads the saved model and samples the greedy tokens of transformers."""
    if importlib.util.find_spec("vllm") is None:
        return
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", VLLM_SCRIPT, str(folder)]
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert "same: True" in process.stdout, process.stdout[-500:] + process.stderr[-2000:]


@pytest.mark.parametrize("shards", ["zero3", "fsdp2"])
def test_sharded_run_merges_the_adapter(launch, vllm_folder, tmp_path, shards):
    keys = {
        "use_peft": True,
        "use_dora": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_modules_to_save": ["norm"],
        "lora_r": 2,
        "lora_dropout": 0.0,
        "max_steps": 2,
    }
    accelerate = (ROOT / "configs" / "accelerate" / f"{shards}.yaml").read_text()
    # Without this setting of ZeRO-3, accelerate cannot gather the weights.
    (tmp_path / "a.yaml").write_text(accelerate.replace("16bit_model: true", "16bit_model: false"))
    single = launch("sft", out=f"lora-{shards}-single", **keys)
    sharded = launch("sft", str(tmp_path / "a.yaml"), out=f"lora-{shards}-sharded", **keys)
    assert_same(single, sharded, vllm_folder)
    export(sharded / "checkpoint-2", tmp_path / "exported")
    assert_same_weights(tmp_path / "exported", sharded / "model", atol=1e-6)


def assert_same_weights(folder, expected, atol=0.0):
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=atol, rtol=0)


def assert_export_joins_shards(checkpoint, folder):
    """Export a checkpoint of ZeRO-3 without the complete weights that it has by default."""
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(checkpoint, folder / "shards", ignore=ignored)
    export(folder / "shards", folder / "exported")
    assert_same_weights(folder / "exported", checkpoint)


# GRPO and HAPO without shards are in test_processes.py.
@pytest.mark.parametrize("name, shards", [(n, s) for s in SHARDS for n in RUNS if s != "cpu2" or n == "sft"])
def test_sharded_run_learns_the_weights_of_one_process(launch, launch_single, vllm_folder, name, shards):
    run = launch(name, shards)
    assert (run / "checkpoint-2" / SHARDS[shards]).exists()
    assert_same(run, launch_single(name), vllm_folder)
    if (name, shards) == ("grpo", "zero3"):
        assert_vllm_loads(run / "model")
    if (name, shards) == ("sft", "zero3"):
        assert_export_joins_shards(run / "checkpoint-2", run.with_name("export"))
    if name == "hapo":  # resume from the checkpoint before the last
        resumed = run.with_name(f"resumed-{shards}")
        shutil.copytree(run, resumed)
        shutil.rmtree(resumed / "checkpoint-4")
        shutil.rmtree(resumed / "model")
        launch(name, shards, "--resume", out=resumed.name)
        assert_same(resumed, run, vllm_folder)
