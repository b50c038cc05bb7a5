"""Complete runs of a tiny random model on the CPU: the files of the run directory, and resuming."""

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
TRAIN["rewards"] = [f"{TOY}:variety"]  # the environment's own reward is always 0 for a random model
SFT = CPU | CAUSAL | {"per_device_train_batch_size": 4, "max_steps": 2}


@pytest.fixture
def rlkit(monkeypatch, capsys, tmp_path):
    """Return a function that runs a command in this process and returns its stdout."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["rlkit", *map(str, argv)])
        code = cli.main()
        output = capsys.readouterr()
        assert code == 0, output.err
        return output.out

    return run


@pytest.fixture
def write_config(tmp_path, tiny_folder):
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


def test_sft_then_train_then_resume(rlkit, write_config, tmp_path):
    output = rlkit("sft", "--config", write_config("warm", **SFT))
    warm = tmp_path / "warm"
    assert_complete(warm, 2)
    assert {line["stage"] for line in metrics(warm)} == {"sft"}
    assert "correct on 4 held-out test tasks" in output and "report.html" in output

    path = write_config("run", **TRAIN, model_name_or_path=str(warm / "model"))
    rlkit("train", "--config", path)
    run = tmp_path / "run"
    assert_complete(run, 2)
    assert sorted(p.name for p in (run / "rollouts").iterdir()) == [f"step-00000{i}.parquet" for i in (1, 2)]
    frame = pd.read_parquet(run / "rollouts")
    columns = [
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
    assert set(columns) <= set(frame) and len(frame) == 16
    first = next(line for line in metrics(run) if line["step"] == 1 and "reward" in line)
    assert {"rewards/correct/mean", "rewards/correct/std", "rewards/correct/error_rate"} <= set(first)

    # A finished run continues if max_steps is raised, and is evaluated again at its new end.
    (run / "evaluation" / "after.json").write_text("stale")
    rlkit("train", "--config", path, "--resume", "--max_steps", 3)
    assert_complete(run, 3)
    assert [line["step"] for line in metrics(run) if "reward" in line] == [1, 2, 3]
    # Resuming a finished run changes nothing.
    rlkit("train", "--config", run / "config.yaml", "--resume")
    assert_complete(run, 3)


def test_interrupted_run_resumes_like_an_uninterrupted_run(rlkit, write_config, tmp_path, tiny_folder):
    from safetensors.torch import load_file

    keys = TRAIN | {"max_steps": 4, "save_steps": 2, "evaluation_tasks": 0}
    rlkit("train", "--config", write_config("uninterrupted", **keys))
    rlkit("train", "--config", write_config("resumed", **keys))
    run = tmp_path / "resumed"
    # As if killed in step 4: checkpoint and model are missing, rollouts and metrics of the step exist.
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "model")
    rlkit("train", "--config", run / "config.yaml", "--resume")
    assert (run / "checkpoint-4").is_dir()
    folders = (tiny_folder, tmp_path / "uninterrupted" / "model", run / "model")
    start, expected, actual = (load_file(f"{folder}/model.safetensors") for folder in folders)
    for name, tensor in expected.items():
        assert (tensor - start[name]).abs().max() > 1e-4, name
        assert (tensor - actual[name]).abs().max() < 1e-5, name


def test_lora_run_saves_a_merged_model(rlkit, write_config, tmp_path, tiny_folder):
    from safetensors.torch import load_file

    keys = {
        "use_peft": True,
        "lora_r": 2,
        "lora_target_modules": "all-linear",
        "evaluation_tasks": 2,
        "beta": 0.1,
    }
    rlkit("train", "--config", write_config("lora", **(TRAIN | keys | {"evaluation_steps": 1})))
    run = tmp_path / "lora"
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (tiny_folder, run / "model"))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
    assert sorted(p.stem for p in (run / "evaluation").iterdir()) == ["after", "before", "step-1"]


def test_run_writes_tensorboard_events(rlkit, write_config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    keys = {"report_to": "tensorboard", "evaluation_tasks": 0, "max_steps": 1, "save_strategy": "no"}
    rlkit("train", "--config", write_config("board", **(TRAIN | keys)))
    assert list((tmp_path / "events").rglob("events.out.tfevents*"))


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_run_writes_an_offline_wandb_run(write_config, tmp_path):
    pytest.importorskip("wandb")
    keys = {"report_to": "wandb", "evaluation_tasks": 0, "max_steps": 1, "save_strategy": "no"}
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    command = [sys.executable, "-m", "rlkit", "train"]
    command += ["--config", str(write_config("board", **(TRAIN | keys)))]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_eval_and_compare(rlkit, tmp_path, tiny_folder):
    argv = ["eval", tiny_folder, "--environment", f"{TOY}:Letters", "-n", 5, "--max_completion_length", 4]
    options = ["--samples", 2, "--temperature", 1, "--json", "--out", tmp_path / "a.json"]
    result = json.loads(rlkit(*argv, *options))
    assert set(result["pass_at"]) == {"1", "2"} and result["accuracy"]["n"] == 5
    output = rlkit(*argv, "--out", tmp_path / "b.json")
    assert "correct" in output and "vowel = True" in output
    evaluation = json.loads((tmp_path / "a.json").read_text())
    assert len(evaluation["completions"]) == 10
    comparison = json.loads(rlkit("eval", "--compare", tmp_path / "b.json", tmp_path / "a.json", "--json"))
    assert comparison["n"] == 5 and 0 <= comparison["p"] <= 1
    assert "on 5 tasks" in rlkit("eval", "--compare", tmp_path / "b.json", tmp_path / "a.json")


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_two_processes_split_a_group(write_config, tmp_path):
    """Each process gets two of the four rollouts of a group."""
    keys = TRAIN | {"per_device_train_batch_size": 2, "save_strategy": "no", "ddp_backend": "gloo"}
    path = write_config("two", **keys)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "rlkit", "train", "--config", str(path)]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    run = tmp_path / "two"
    frame = pd.read_parquet(run / "rollouts")
    assert frame.groupby("step").size().tolist() == [4, 4]
    assert frame.groupby("step")["task_id"].nunique().tolist() == [1, 1]
    assert len(json.loads((run / "evaluation" / "after.json").read_text())["scores"]) == 4
    assert (run / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_search_with_protocol_tags_trains_with_sft_and_grpo(rlkit, write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    world = {"world_size": 100, "hops": [1], "topk": 1, "prompt_style": "short"}
    keys = {"environment": "search-v3", "environment_args": world, "max_completion_length": 900}
    rlkit(
        "sft", "--config", write_config("sft", **(SFT | keys), demonstrations="solution", save_strategy="no")
    )
    assert (tmp_path / "sft" / "model" / "model.safetensors").exists()
    keys |= {"max_turn_tokens": 12, "rewards": ["f1", f"{TOY}:variety"], "save_steps": 2}
    rlkit("train", "--config", write_config("grpo", **(TRAIN | keys)))
    frame = pd.read_parquet(tmp_path / "grpo" / "rollouts")
    assert len(frame) == 16 and frame["invalid"].isna().all()
    assert set(frame["rewards/f1"]) == {0.0}  # a random model answers no question
    assert (frame["length"] <= 5 * 12).all() and (frame["truncated"]).all()


@pytest.mark.slow
def test_search_with_tool_calls_trains_with_sft_and_grpo(
    rlkit, write_config, tmp_path, tiny_folder, monkeypatch
):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    system = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    content = "{{ m['content'] }}"
    calls = "{% for c in m['tool_calls'] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}"
    tokenizer.chat_template = system + tokenizer.chat_template.replace(content, content + calls)
    shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    world = {"world_size": 100, "hops": [1], "topk": 1, "prompt_style": "short", "protocol": "tools"}
    keys = {"environment": "search-v3", "environment_args": world, "max_completion_length": 900}
    keys |= {"model_name_or_path": str(tmp_path / "model")}
    demonstrations = {"demonstrations": "solution", "save_strategy": "no", "max_length": 2000}
    rlkit("sft", "--config", write_config("sft", **(SFT | keys | demonstrations)))
    prompts = []

    def recording_tokenize(*arguments, **template):
        prompts.extend(tokenize(*arguments, **template))
        return prompts[-len(arguments[1]) :]

    monkeypatch.setattr("rlkit.training.step.tokenize", recording_tokenize)
    keys |= {"max_turn_tokens": 12, "rewards": ["f1", f"{TOY}:variety"], "save_steps": 2}
    rlkit("train", "--config", write_config("grpo", **(TRAIN | keys)))
    assert len(prompts) == 16
    assert all('"name": "search"' in tokenizer.decode(ids) for ids in prompts)
    frame = pd.read_parquet(tmp_path / "grpo" / "rollouts")
    assert len(frame) == 16 and frame["invalid"].isna().all()
