"""Demonstrations are the environment's own answers, and the loss is on them alone."""

from pathlib import Path

import pytest

from rlkit.environment import load_environment
from rlkit.errors import UserError
from rlkit.sft import demonstrations

TOY = str(Path(__file__).parents[1] / "toy.py")


def test_answers():
    environment = load_environment(f"{TOY}:Letters")
    rows = demonstrations(environment, environment.tasks("train", 3), "answer")
    assert rows.column_names == ["prompt", "completion"]
    assert [row["completion"] for row in rows] == [
        [{"role": "assistant", "content": text}] for text in ("aaa", "bbb", "ccc")
    ]
    assert rows[1]["prompt"] == [{"role": "user", "content": "Say b!"}]


def test_prompts_that_are_text():
    environment = load_environment(f"{TOY}:Letters")
    tasks = environment.tasks("train", 2).map(lambda row: {"prompt": row["prompt"][0]["content"]})
    rows = demonstrations(environment, tasks, "answer")
    assert rows[0] == {"prompt": "Say a", "completion": "aaa"}


def test_worked_solutions_end_in_the_right_answer():
    environment = load_environment("causal-v1", num_nodes=3)
    tasks = environment.tasks("train", 4)
    for task, row in zip(tasks, demonstrations(environment, tasks, "solution"), strict=True):
        text = row["completion"][0]["content"]
        assert len(text) > len(environment.answer(task))
        assert environment.score(task, text)["correct"] == 1.0


def test_no_worked_solution():
    environment = load_environment(f"{TOY}:Letters")
    with pytest.raises(UserError, match="letters-v1 writes no worked solution for task 0-a"):
        demonstrations(environment, environment.tasks("train", 2), "solution")


def test_the_loss_is_on_the_completion_alone(tmp_path, tiny_model, tiny_tokenizer):
    from trl import SFTConfig, SFTTrainer

    environment = load_environment(f"{TOY}:Letters")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    trainer = SFTTrainer(
        tiny_model(),
        args=SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=1, **options),
        train_dataset=demonstrations(environment, environment.tasks("train", 1), "answer"),
        processing_class=tiny_tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    scored = batch["labels"][0][batch["labels"][0] != -100]
    # TRL ends the turn as the template does: <|im_end|> and a newline.
    assert tiny_tokenizer.decode(scored) == "aaa<|im_end|>\n"
