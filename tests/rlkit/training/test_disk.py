"""The disk space that a run needs: estimates are near the sizes of real checkpoints and models."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

from rlkit.errors import UserError
from rlkit.models.load import save_model
from rlkit.training.disk import (
    DiskEstimate,
    check_room,
    count_steps,
    estimate_disk,
    free_bytes,
    num_checkpoints,
)
from rlkit.training.sft import SFTTrainer
from rlkit.training.start_checks import check_saving
from tests.conftest import make_tokenizer

GIB = 2**30
ROWS = Dataset.from_list([{"prompt": "a b", "completion": "c d e"}] * 4)
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 500}


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("options", "lora", "dtype"),
    [
        ({"optim": "adamw_torch"}, None, torch.float32),
        ({"optim": "adamw_torch_fused"}, None, torch.bfloat16),
        ({"optim": "sgd"}, None, torch.float32),
        ({"optim": "adafactor"}, None, torch.float32),
        ({"save_only_model": True}, None, torch.float32),
        ({}, {"target_modules": "all-linear"}, torch.bfloat16),
        ({}, {"target_modules": ["embed_tokens", "q_proj"]}, torch.float32),
        ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, torch.float32),
    ],
    ids=str,
)
def test_estimate_is_near_the_size_of_a_checkpoint_and_of_the_model(
    tmp_path, tiny_model, options, lora, dtype
):
    args = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=2,
        **options,
    )
    tokenizer = make_tokenizer()
    adapter = None if lora is None else LoraConfig(task_type="CAUSAL_LM", r=16, **lora)
    trainer = SFTTrainer(
        tiny_model("llama", **SIZES).to(dtype),
        args=args,
        train_dataset=ROWS,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    size = check_saving(trainer.model, tokenizer, args)
    estimate = estimate_disk(trainer.model, args, 1, processing_bytes=size)
    trainer.train()
    save_model(trainer.model, tokenizer, tmp_path / "model")
    assert estimate.checkpoint_bytes == pytest.approx(num_bytes(tmp_path / "checkpoint-1"), rel=0.05)
    assert estimate.model_bytes == pytest.approx(num_bytes(tmp_path / "model"), rel=0.05)


def test_estimate_of_an_optimizer_that_needs_a_device_counts_bytes_per_parameter(tiny_model):
    model = tiny_model("llama")
    options = {"report_to": "none", "save_only_model": False, "use_cpu": True, "optim": "adamw_bnb_8bit"}
    estimate = estimate_disk(model, TrainingArguments(**options), 1)
    plain = estimate_disk(model, TrainingArguments(**options | {"save_only_model": True}), 1)
    num_weights = sum(weight.numel() for weight in model.parameters())
    assert estimate.checkpoint_bytes - plain.checkpoint_bytes == 2 * num_weights


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"save_steps": 4}, 3),  # steps 4, 8 and the last
        ({"save_steps": 0.25}, 4),
        ({"save_steps": 500}, 1),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, 3),
    ],
)
def test_num_checkpoints_counts_those_that_transformers_writes(options, expected):
    args = TrainingArguments(report_to="none", use_cpu=True, **options)
    assert num_checkpoints(args, 10) == expected


def test_count_steps_follows_the_batch_size_and_the_number_of_processes():
    args = TrainingArguments(
        report_to="none", use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert [count_steps(args, 100, processes) for processes in (1, 2)] == [39, 21]
    args.max_steps = 7
    assert count_steps(args, 100, 1) == 7


def test_old_checkpoint_exists_until_the_new_one_is_complete():
    estimate = DiskEstimate(3.0, 1.0, num_steps=10, num_saved=5, limit=1)
    assert (estimate.num_kept, estimate.minimum_bytes, estimate.peak_bytes) == (1, 4.0, 6.0)
    assert DiskEstimate(3.0, 1.0, 10, 5, None).peak_bytes == 16.0
    assert DiskEstimate(3.0, 1.0, 10, 0, None).peak_bytes == 1.0


def test_check_room_refuses_a_run_that_cannot_end_and_warns_of_one_that_will_fill_the_disk(tmp_path):
    run = tmp_path / "run"
    options = {"resume": False, "overwrite": False}
    free = free_bytes(run)
    with pytest.raises(UserError, match=r"a checkpoint and the model need .* GiB, and .* are free"):
        check_room(DiskEstimate(free, GIB, 10, 1, None), run, **options)
    warning = check_room(DiskEstimate(free / 4, 0, 10, 8, None), run, **options)
    assert warning is not None and "8 checkpoints" in warning and "save_total_limit" in warning
    assert check_room(DiskEstimate(free / 4, 0, 10, 8, 2), run, **options) is None
    assert not run.exists()


def test_check_room_counts_the_checkpoints_of_a_resumed_run(tmp_path):
    free = free_bytes(tmp_path)
    estimate = DiskEstimate(free * 2 / 3, free / 2, 10, 5, 1)
    with pytest.raises(UserError, match="not enough disk space"):
        check_room(estimate, tmp_path, resume=False, overwrite=False)
    (tmp_path / "checkpoint-8").mkdir()
    assert check_room(estimate, tmp_path, resume=True, overwrite=False) is None
    # After the last step only the model is missing.
    (tmp_path / "checkpoint-10").mkdir()
    finished = DiskEstimate(free * 2, free / 2, 10, 5, 1)
    assert check_room(finished, tmp_path, resume=True, overwrite=False) is None


def test_free_bytes_include_the_files_of_a_run_that_is_overwritten(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(50_000_000))
    assert free_bytes(tmp_path, overwrite=True) - free_bytes(tmp_path) > 40_000_000
