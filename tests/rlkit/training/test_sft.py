"""Demonstrations are the environment's own answers, and the loss is on them alone."""

import pytest

from rlkit.environment import Reply
from rlkit.errors import UserError
from rlkit.evaluation import Evaluation, Interval
from rlkit.registry import load_environment
from rlkit.training.demonstrations import best_answers, demonstrations, played
from tests.quick import TOY


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


def in_loss(row):
    return [token for token in row["labels"] if token != -100]


def test_scripts_are_played_and_replies_stand_outside_the_loss(tiny_tokenizer):
    environment = load_environment(f"{TOY}:Scripted")
    tasks = environment.tasks("train", 3)
    rows = played(environment, tasks, tiny_tokenizer, [2], tokens=60)
    texts = [tiny_tokenizer.decode(row["input_ids"]) for row in rows]
    head = "<|im_start|>user\nSay b!<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1] == head + "one[b]</>bbb<|im_end|>"  # the reply's "e" would have ended a turn
    assert [tiny_tokenizer.decode(in_loss(row)) for row in rows] == [
        f"one{letter * 3}<|im_end|>" for letter in "abc"
    ]
    assert all(len(row["labels"]) == len(row["input_ids"]) for row in rows)


def test_tasks_without_a_script_or_without_room_are_left_out(tiny_tokenizer, caplog):
    environment = load_environment(f"{TOY}:Scripted")
    tasks = environment.tasks("train", 5)
    assert len(played(environment, tasks, tiny_tokenizer, [2], tokens=60)) == 4  # none for "e"
    assert "4 of 5 tasks" in caplog.text
    with pytest.raises(UserError, match="none of 5 tasks has a script that is played to its end in 5 tokens"):
        played(environment, tasks, tiny_tokenizer, [2], tokens=5)


def test_what_is_cut_or_ended_by_the_environment_teaches_nothing(tiny_tokenizer):
    environment = load_environment(f"{TOY}:Scripted")
    tasks = environment.tasks("train", 3)
    whole = played(environment, tasks, tiny_tokenizer, [2], tokens=60)
    shortest = min(len(row["input_ids"]) for row in whole)
    assert len(played(environment, tasks, tiny_tokenizer, [2], tokens=60, in_all=shortest)) == 1
    environment.respond = lambda turns: [Reply(done=True) for _ in turns]
    with pytest.raises(UserError, match="none of 3 tasks"):
        played(environment, tasks, tiny_tokenizer, [2], tokens=60)


def test_a_turn_is_closed_as_the_template_closes_it(tiny_tokenizer):
    environment = load_environment(f"{TOY}:Scripted")
    tasks = environment.tasks("train", 1)
    (row,) = played(environment, tasks, tiny_tokenizer, [1, 2], tokens=60)  # 1 is <|im_start|>
    assert in_loss(row)[-1] == 2


def test_an_environment_that_fails_demonstrates_nothing(tiny_tokenizer):
    environment = load_environment(f"{TOY}:Scripted")
    environment.respond = lambda turns: 1 / 0
    with pytest.raises(UserError, match=r"3 demonstrations failed, the first: .*ZeroDivisionError"):
        played(environment, environment.tasks("train", 3), tiny_tokenizer, [2], tokens=60)


def evaluated(path, *answers):
    """A file of an evaluation; answers are task, score, text and whether it is whole."""
    completions = [
        {
            "task_id": task,
            "score": score,
            "invalid": "the reward failed" if score is None else None,
            "truncated": not whole,
            "turns": [{"role": "assistant", "content": text}],
        }
        for task, score, text, whole in answers
    ]
    of = {"name": "x", "model": "m", "environment": "letters-v1", "environment_args": {}, "split": "train"}
    numbers = {
        "seed": 0,
        "temperature": 1.0,
        "samples": 2,
        "metric": "exact",
        "length": 1.0,
        "truncated": 0.0,
    }
    rest = {"pass_at": {}, "avg_at": {}, "rewards": {}, "invalid": 0, "breakdown": {}, "scores": {}}
    accuracy = Interval(0.5, 0.4, 0.6, 2)
    Evaluation(**of, **numbers, **rest, accuracy=accuracy, completions=completions).save(path)
    return str(path)


def test_the_best_of_several_answers_are_demonstrations(tmp_path, tiny_tokenizer):
    environment = load_environment(f"{TOY}:Letters")
    tasks = environment.tasks("train", 6)
    ids = tasks["task_id"]
    path = evaluated(
        tmp_path / "a.json",
        (ids[0], 0.2, "ab", True),
        (ids[0], 0.9, "aa", True),
        (ids[0], 1.0, "aaaa", False),  # cut short
        (ids[1], 0.0, "x", True),
        (ids[1], 0.0, "y", True),
        (ids[2], 0.5, "x", True),  # alike: nothing to prefer
        (ids[2], 0.5, "y", True),
        (ids[3], None, "x", True),
        (ids[4], 0.7, "only", True),
    )
    script = best_answers(path, environment)
    assert [script(task) for task in tasks] == [["aa"], None, None, None, ["only"], None]
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = played(environment, tasks, tiny_tokenizer, [end], tokens=20, script=script)
    assert len(rows) == 2
    scored = [label for label in rows[0]["labels"] if label != -100]
    assert tiny_tokenizer.decode(scored) == "aa<|im_end|>"
    assert tiny_tokenizer.decode(rows[0]["input_ids"]).endswith("aa<|im_end|>")


def test_best_answers_of_another_environment(tmp_path):
    path = evaluated(tmp_path / "a.json")
    with pytest.raises(UserError, match="evaluates letters-v1, not causal-v1"):
        best_answers(path, load_environment("causal-v1"))
