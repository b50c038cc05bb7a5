"""A run that resumes with other settings: refused, or with --resume_anyway trained with whole groups."""

import shutil

import pandas as pd
import pytest

from tests.end_to_end.killing import Run
from tests.quick import QUICK, ROOT, TOY

KEYS = QUICK | {"num_tasks": 12, "evaluation_tasks": 0, "max_steps": 1, "save_steps": 1}
KEYS_BY_STAGE = {
    "train": {
        "environment": f"{TOY}:Odd",
        "max_completion_length": 6,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
    },
    "sft": {"environment": f"{TOY}:Odd", "demonstrations": "answer", "per_device_train_batch_size": 4},
    "rank": {
        "environment": f"{ROOT / 'tests' / 'toy_ranking.py'}:Echo",
        "per_device_train_batch_size": 4,
        "adapter_rank": 2,
    },
}
LORA = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}
# Of each run, the changes that do not fit its weights.
OTHER_WEIGHTS = [
    ("train", {}, LORA, "lora: none -> lora_r=2"),
    ("train", LORA, {"use_peft": False, "lora_r": 16, "lora_target_modules": None}, "-> none"),
    ("train", LORA, {"lora_r": 4}, "-> lora_r=4"),
    ("train", LORA, {"lora_alpha": 64}, "lora_alpha=64"),
    ("sft", {}, {"optim": "sgd"}, "optim: adamw_torch_fused -> sgd"),
    ("rank", {}, {"adapter_rank": 3}, "adapter_rank: 2 -> 3"),
    ("rank", {}, {"adapter_rank": 0, "listwise": 1}, "listwise: none -> 1"),
    ("rank", {}, {"adapter_rank": 0, "cross_encoder": True}, "cross_encoder: none -> True"),
]
# Changes that a policy gradient run accepts with --resume_anyway.
OTHER_ORDERS = [
    {"num_generations": 2},
    {"num_generations": 8},
    {"num_generations": 8, "steps_per_generation": 2, "num_iterations": 2},
    {"num_generations": 2, "dynamic_sampling": True},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    {"seed": 3, "shuffle_dataset": False},
]


@pytest.fixture(scope="module")
def resume(tmp_path_factory, models):
    """Return a function that resumes a run of one step with changed keys: exit code, output and folder."""
    trained = {}

    def resume(stage, keys, changes, *argv):
        folder = tmp_path_factory.mktemp("resumed")
        keys = KEYS | {"model_name_or_path": models[stage]} | KEYS_BY_STAGE[stage] | keys
        name = str((stage, keys))
        if name not in trained:
            run = Run(tmp_path_factory.mktemp("trained"), "run", stage, keys)
            assert run(lambda: None) == 0, run.log.read_text()[-3000:]
            trained[name] = run.path
        run = Run(folder, "run", stage, keys | {"max_steps": 3} | changes)
        shutil.copytree(trained[name], run.path)
        run.argv += argv
        return run(lambda: None), run.log.read_text(), run.path

    return resume


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "keys", "changes", "difference"), OTHER_WEIGHTS)
def test_resume_rejects_other_weights_even_with_resume_anyway(resume, stage, keys, changes, difference):
    code, output, _ = resume(stage, keys, changes, "--resume_anyway", "true")
    assert code == 2 and "Traceback" not in output, output[-3000:]
    line = output.strip().splitlines()[-1]
    assert difference in line and "restore the settings, or choose another --output_dir" in line


@pytest.mark.slow
def test_resume_rejects_a_model_of_another_size_with_one_line(resume, tmp_path, tiny_model, tiny_tokenizer):
    tiny_model("llama").save_pretrained(tmp_path / "wide")
    tiny_tokenizer.save_pretrained(tmp_path / "wide")
    changes = {"model_name_or_path": str(tmp_path / "wide")}
    code, output, _ = resume("train", {}, changes, "--resume_anyway", "true")
    assert code == 2 and "Traceback" not in output, output[-3000:]
    assert "checkpoint-1: Error(s) in loading state_dict" in output.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("changes", OTHER_ORDERS)
def test_resume_anyway_samples_whole_groups_of_the_new_size(resume, changes):
    code, output, _ = resume("train", {}, changes)
    name, value = next(iter(changes.items()))
    old = KEYS_BY_STAGE["train"].get(name, 42)
    assert code == 2 and f"{name}: {old} -> {value}" in output.strip().splitlines()[-1], output[-3000:]
    code, output, run = resume("train", {}, changes, "--resume_anyway", "true")
    assert code == 0, output[-3000:]
    frame = pd.read_parquet(run / "rollouts")
    size = changes.get("num_generations", 4)
    for _, rows in frame[frame["step"] > 1].groupby("step"):
        assert len(rows) >= 8
        groups = [rows["task_id"][i : i + size] for i in range(0, len(rows), size)]
        assert all(len(group) == size and group.nunique() == 1 for group in groups)
    assert set(frame["step"]) == ({1, 2} if "num_iterations" in changes else {1, 2, 3})
