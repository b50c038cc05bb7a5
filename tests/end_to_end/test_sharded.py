"""GRPO, HAPO and SFT in two processes under ZeRO-2, ZeRO-3 and FSDP2 end where one process does."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from tests.quick import QUICK, ROOT, TOY

KEYS = QUICK | {
    "num_tasks": 20,
    "save_steps": 2,
    "max_steps": 4,
    "max_completion_length": 6,
    "adam_epsilon": 0.1,  # a usual one makes much of the rounding of a small gradient
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "evaluation_tasks": 6,
    "gradient_checkpointing": False,
}
RUNS = {
    "grpo": ("train", {"num_generations": 4}),
    "hapo": ("train", {"num_generations": 4, "algorithm": "hapo", "beta": 0.0}),
    "sft": ("sft", {"environment": f"{TOY}:Letters", "num_tasks": 32}),  # whole batches
}
# What a sum of float32 gradients in another order may change, relative to how far the weights moved.
TOLERANCE = 1e-3
SHARDS = {  # files of a checkpoint that only this way of sharding writes
    "cpu2": "optimizer.pt",
    "zero2": "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "zero3": "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt",
    "fsdp2": "pytorch_model_fsdp.bin",
}
# vLLM's greedy tokens and those of transformers, of the model in a folder.
IN_VLLM = """
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
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launch(tmp_path_factory, vllm_folder):
    """Run RUNS[name] in one process, or in two as an accelerate config says; return the run directory."""
    folder = tmp_path_factory.mktemp("sharded")

    def launch(name, accelerate=None, *words, out=None, **keys):
        kind, own = RUNS[name]
        run = folder / (out or f"{name}-{accelerate}")
        path = folder / f"{run.name}.yaml"
        batch = {"per_device_train_batch_size": 2 if accelerate else 8, "model_name_or_path": vllm_folder}
        batch |= {"gradient_accumulation_steps": 2 if accelerate else 1}
        path.write_text(yaml.safe_dump(KEYS | batch | own | {"output_dir": str(run)} | keys))
        if accelerate:
            words = ("--accelerate", accelerate, "--num_processes", "2", *words)
        command = [sys.executable, "-m", "rlkit", kind, str(path), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return run

    return launch


@pytest.fixture(scope="module")
def alone(launch):
    """The runs in one process, each made once."""
    made = {}

    def alone(name):
        if name not in made:
            made[name] = launch(name)
        return made[name]

    return alone


def rollouts(run):
    columns = ["step", "task_id", "completion", "reward", "advantage"]
    frame = pd.read_parquet(run / "rollouts")[columns]
    return frame.sort_values(columns[:3], kind="stable").reset_index(drop=True)


def logged(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def distance(a, b):
    return sum((a[key].float() - b[key].float()).norm() ** 2 for key in a) ** 0.5


def assert_same(run, other, start):
    """Two runs learned the same, from weights that they left."""
    if (run / "rollouts").is_dir() and list((run / "rollouts").iterdir()):
        pd.testing.assert_frame_equal(rollouts(run), rollouts(other), rtol=1e-4, atol=1e-5)
        assert logged(run, "reward") == pytest.approx(logged(other, "reward"), abs=1e-6)
    assert logged(run, "loss") == pytest.approx(logged(other, "loss"), abs=1e-4)
    scores = [json.loads((path / "evaluation" / "after.json").read_text())["scores"] for path in (run, other)]
    assert scores[0] == scores[1]
    weights = [load_file(Path(folder) / "model.safetensors") for folder in (run / "model", other / "model")]
    start = load_file(Path(start) / "model.safetensors")
    assert weights[0].keys() == weights[1].keys() == start.keys()
    assert distance(weights[1], start) > 1e-4
    assert distance(*weights) < TOLERANCE * distance(weights[1], start)


def assert_vllm_loads(folder):
    """vLLM takes the model as it was saved, and says what transformers says."""
    if importlib.util.find_spec("vllm") is None:
        return
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", IN_VLLM, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "same: True" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]


@pytest.mark.parametrize("shards", ["zero3", "fsdp2"])
def test_an_adapter_is_merged(launch, vllm_folder, shards):
    keys = {
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_r": 2,
        "lora_dropout": 0.0,
        "max_steps": 2,
    }
    runs = [launch("sft", way, out=f"lora-{shards}-{i}", **keys) for i, way in enumerate((None, shards))]
    assert_same(*runs, vllm_folder)


# GRPO and HAPO without shards are in test_processes.py.
@pytest.mark.parametrize("name, shards", [(n, s) for s in SHARDS for n in RUNS if s != "cpu2" or n == "sft"])
def test_two_processes_learn_what_one_does(launch, alone, vllm_folder, name, shards):
    run = launch(name, shards)
    assert (run / "checkpoint-2" / SHARDS[shards]).exists()
    assert_same(run, alone(name), vllm_folder)
    if (name, shards) == ("grpo", "zero3"):
        assert_vllm_loads(run / "model")
    if name == "hapo":  # it goes on from its last checkpoint but one
        again = run.with_name(f"again-{shards}")
        shutil.copytree(run, again)
        shutil.rmtree(again / "checkpoint-4")
        shutil.rmtree(again / "model")
        launch(name, shards, "--resume", out=again.name)
        assert_same(again, run, vllm_folder)
