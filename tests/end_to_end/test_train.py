"""Whole runs of a tiny random model on the CPU: what stands in the run directory, and how runs go on."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from transformers import AutoTokenizer

from rlkit.commands import main as cli
from rlkit.rollouts.tokenize import tokenize
from tests.quick import ROOT, TOY

CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}
CAUSAL = {
    "environment": "causal-v1",
    "environment_args": {"num_nodes": 3, "prompt_style": "short"},
    "evaluation_tasks": 4,
    "num_tasks": 16,
    "logging_steps": 1,
    "save_steps": 1,
    "max_steps": 2,
    "max_completion_length": 6,
}
TRAIN = CPU | CAUSAL | {"num_generations": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
TRAIN["rewards"] = [f"{TOY}:variety"]  # a random model earns nothing from the environment's own
SFT = CPU | CAUSAL | {"per_device_train_batch_size": 4, "max_steps": 2}


@pytest.fixture
def rlkit(monkeypatch, capsys, tmp_path):
    """Run the command line in this process and return what it printed."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["rlkit", *map(str, words)])
        code = cli.main()
        output = capsys.readouterr()
        assert code == 0, output.err
        return output.out

    return run


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    def write(name, **keys):
        path = tmp_path / f"{name}.yaml"
        keys = {"model_name_or_path": tiny_folder, "output_dir": str(tmp_path / name)} | keys
        path.write_text(yaml.safe_dump(keys))
        return path

    return write


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_step(run):
    return max(line["step"] for line in metrics(run))


def assert_complete(run, steps):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert yaml.safe_load((run / "config.yaml").read_text())["environment"] == "causal-v1"
    assert last_step(run) == steps
    assert (run / f"checkpoint-{steps}" / "trainer_state.json").exists()
    for name in ("before", "after"):
        assert len(json.loads((run / "evaluation" / f"{name}.json").read_text())["scores"]) == 4
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.vocab_size == 128
    assert AutoTokenizer.from_pretrained(run / "model").eos_token == "<|im_end|>"
    assert "<html" in (run / "report.html").read_text()[:200].lower()


def test_sft_then_train_then_go_on(rlkit, recipe, tmp_path):
    said = rlkit("sft", "--config", recipe("warm", **SFT))
    warm = tmp_path / "warm"
    assert_complete(warm, 2)
    assert {line["stage"] for line in metrics(warm)} == {"sft"}
    assert "correct on 4 held-out test tasks" in said and "report.html" in said

    path = recipe("run", **TRAIN, model_name_or_path=str(warm / "model"))
    rlkit("train", "--config", path)
    run = tmp_path / "run"
    assert_complete(run, 2)
    assert sorted(p.name for p in (run / "rollouts").iterdir()) == [f"step-00000{i}.parquet" for i in (1, 2)]
    frame = pd.read_parquet(run / "rollouts")
    promised = [
        "step",
        "task_id",
        "prompt",
        "completion",
        "answer",
        "reward",
        "advantage",
        "length",
        "invalid",
        "rewards/correct",
    ]
    assert set(promised) <= set(frame) and len(frame) == 16
    first = next(line for line in metrics(run) if line["step"] == 1 and "reward" in line)
    assert {"rewards/correct/mean", "rewards/correct/std", "rewards/correct/error_rate"} <= set(first)

    # A finished run goes on when it is given more steps, and is evaluated again at its new end.
    (run / "evaluation" / "after.json").write_text("stale")
    rlkit("train", "--config", path, "--resume", "--max_steps", 3)
    assert_complete(run, 3)
    assert [line["step"] for line in metrics(run) if "reward" in line] == [1, 2, 3]
    # Nothing to do: the same end.
    rlkit("train", "--config", run / "config.yaml", "--resume")
    assert_complete(run, 3)


def test_a_killed_run_ends_where_it_would_have(rlkit, recipe, tmp_path, tiny_folder):
    from safetensors.torch import load_file

    keys = TRAIN | {"max_steps": 4, "save_steps": 2, "evaluation_tasks": 0}
    rlkit("train", "--config", recipe("whole", **keys))
    rlkit("train", "--config", recipe("killed", **keys))
    killed = tmp_path / "killed"
    # As after a kill in step 4: no last checkpoint, no model, but rollouts and metrics beyond the last one.
    shutil.rmtree(killed / "checkpoint-4")
    shutil.rmtree(killed / "model")
    rlkit("train", "--config", killed / "config.yaml", "--resume")
    assert (killed / "checkpoint-4").is_dir()
    folders = (tiny_folder, tmp_path / "whole" / "model", tmp_path / "killed" / "model")
    start, whole, again = (load_file(f"{folder}/model.safetensors") for folder in folders)
    for name, tensor in whole.items():
        assert (tensor - start[name]).abs().max() > 1e-4, name
        assert (tensor - again[name]).abs().max() < 1e-5, name


def test_lora_is_merged_into_a_plain_model(rlkit, recipe, tmp_path, tiny_folder):
    from safetensors.torch import load_file

    keys = {
        "use_peft": True,
        "lora_r": 2,
        "lora_target_modules": "all-linear",
        "evaluation_tasks": 2,
        "beta": 0.1,
    }
    rlkit("train", "--config", recipe("lora", **(TRAIN | keys | {"evaluation_steps": 1})))
    run = tmp_path / "lora"
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (tiny_folder, run / "model"))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
    assert sorted(p.stem for p in (run / "evaluation").iterdir()) == ["after", "before", "step-1"]


def test_tensorboard_writes_its_events(rlkit, recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    keys = {"report_to": "tensorboard", "evaluation_tasks": 0, "max_steps": 1, "save_strategy": "no"}
    rlkit("train", "--config", recipe("board", **(TRAIN | keys)))
    assert list((tmp_path / "events").rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_wandb_writes_an_offline_run(recipe, tmp_path):
    pytest.importorskip("wandb")
    keys = {"report_to": "wandb", "evaluation_tasks": 0, "max_steps": 1, "save_strategy": "no"}
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    words = ["-m", "rlkit", "train", "--config", str(recipe("board", **(TRAIN | keys)))]
    subprocess.run([sys.executable, *words], env=environment, check=True, capture_output=True, timeout=300)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_eval_and_compare(rlkit, tmp_path, tiny_folder):
    words = ["eval", tiny_folder, "--environment", f"{TOY}:Letters", "-n", 5, "--max_completion_length", 4]
    result = json.loads(
        rlkit(*words, "--samples", 2, "--temperature", 1, "--json", "--out", tmp_path / "a.json")
    )
    assert set(result["pass_at"]) == {"1", "2"} and result["accuracy"]["n"] == 5
    said = rlkit(*words, "--out", tmp_path / "b.json")
    assert "correct" in said and "vowel = True" in said
    saved = json.loads((tmp_path / "a.json").read_text())
    assert len(saved["completions"]) == 10
    compared = json.loads(rlkit("eval", "--compare", tmp_path / "b.json", tmp_path / "a.json", "--json"))
    assert compared["n"] == 5 and 0 <= compared["p"] <= 1
    assert "on 5 tasks" in rlkit("eval", "--compare", tmp_path / "b.json", tmp_path / "a.json")


@pytest.mark.slow
def test_two_processes(recipe, tmp_path):
    """Groups of four on two processes that get two rollouts of each: TRL splits them."""
    keys = TRAIN | {"per_device_train_batch_size": 2, "save_strategy": "no", "ddp_backend": "gloo"}
    path = recipe("two", **keys)
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    words += ["-m", "rlkit", "train", "--config", str(path)]
    subprocess.run([sys.executable, *words], check=True, timeout=120, cwd=ROOT)
    run = tmp_path / "two"
    frame = pd.read_parquet(run / "rollouts")
    assert frame.groupby("step").size().tolist() == [4, 4]
    assert frame.groupby("step")["task_id"].nunique().tolist() == [1, 1]
    assert len(json.loads((run / "evaluation" / "after.json").read_text())["scores"]) == 4
    assert (run / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_scripts_of_searches_are_learned_and_then_searches_are_rewarded(rlkit, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    world = {"world_size": 100, "hops": [1], "topk": 1, "prompt_style": "short"}
    keys = {"environment": "search-v2", "environment_args": world, "max_completion_length": 900}
    rlkit("sft", "--config", recipe("sft", **(SFT | keys), demonstrations="solution", save_strategy="no"))
    assert (tmp_path / "sft" / "model" / "model.safetensors").exists()
    keys |= {"max_turn_tokens": 12, "rewards": ["f1", f"{TOY}:variety"], "save_steps": 2}
    rlkit("train", "--config", recipe("grpo", **(TRAIN | keys)))
    frame = pd.read_parquet(tmp_path / "grpo" / "rollouts")
    assert len(frame) == 16 and frame["invalid"].isna().all()
    assert set(frame["rewards/f1"]) == {0.0}  # a random model finds nothing
    assert (frame["length"] <= 5 * 12).all() and (frame["truncated"]).all()


@pytest.mark.slow
def test_calls_of_a_function_are_learned_and_rewarded(rlkit, recipe, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    shown = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    tokenizer.chat_template = shown + tokenizer.chat_template
    shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    world = {"world_size": 100, "hops": [1], "topk": 1, "prompt_style": "short", "protocol": "tools"}
    keys = {"environment": "search-v2", "environment_args": world, "max_completion_length": 900}
    keys |= {"model_name_or_path": str(tmp_path / "model")}
    demonstrations = {"demonstrations": "solution", "save_strategy": "no", "max_length": 2000}
    rlkit("sft", "--config", recipe("sft", **(SFT | keys | demonstrations)))
    prompts = []

    def remember(*arguments, **template):
        prompts.extend(tokenize(*arguments, **template))
        return prompts[-len(arguments[1]) :]

    monkeypatch.setattr("rlkit.training.step.tokenize", remember)
    keys |= {"max_turn_tokens": 12, "rewards": ["f1", f"{TOY}:variety"], "save_steps": 2}
    rlkit("train", "--config", recipe("grpo", **(TRAIN | keys)))
    assert len(prompts) == 16
    assert all('"name": "search"' in tokenizer.decode(ids) for ids in prompts)
    frame = pd.read_parquet(tmp_path / "grpo" / "rollouts")
    assert len(frame) == 16 and frame["invalid"].isna().all()
