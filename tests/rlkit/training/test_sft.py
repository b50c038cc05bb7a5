"""Demonstrations: answers, worked solutions, scripts and rejection samples, with the loss on them only."""

import pytest

from rlkit.environment import Reply
from rlkit.errors import UserError
from rlkit.evaluation import Evaluation, Interval
from rlkit.registry import load_environment
from rlkit.training.demonstrations import demonstrations, rejection_samples, scripted_demonstrations
from tests.quick import TOY


def test_answers_become_completions():
    environment = load_environment(f"{TOY}:Letters")
    rows = demonstrations(environment, environment.tasks("train", 3), "answer")
    assert rows.column_names == ["prompt", "completion"]
    assert [row["completion"] for row in rows] == [
        [{"role": "assistant", "content": text}] for text in ("aaa", "bbb", "ccc")
    ]
    assert rows[1]["prompt"] == [{"role": "user", "content": "Say b!"}]


def test_string_prompts_get_string_completions():
    environment = load_environment(f"{TOY}:Letters")
    tasks = environment.tasks("train", 2).map(lambda row: {"prompt": row["prompt"][0]["content"]})
    rows = demonstrations(environment, tasks, "answer")
    assert rows[0] == {"prompt": "Say a", "completion": "aaa"}


def test_worked_solutions_score_as_correct():
    environment = load_environment("causal-v1", num_nodes=3)
    tasks = environment.tasks("train", 4)
    for task, row in zip(tasks, demonstrations(environment, tasks, "solution"), strict=True):
        text = row["completion"][0]["content"]
        assert len(text) > len(environment.answer(task))
        assert environment.score(task, text)["correct"] == 1.0


def test_examples_become_completions_of_the_first_turn():
    environment = load_environment("write-v1", collection="generated:300:0", retriever="bm25")
    tasks = environment.tasks("train", 3)
    rows = demonstrations(environment, tasks, "example")
    assert [row["completion"][0]["content"] for row in rows] == list(tasks["query"])
    assert rows[0]["prompt"] == tasks[0]["prompt"]
    letters = load_environment(f"{TOY}:Letters")
    with pytest.raises(UserError, match="has no example for task"):
        demonstrations(letters, letters.tasks("train", 1), "example")


@pytest.fixture(scope="module")
def demonstrate_questions():
    """Return a function from a range of tasks and a kind of demonstration to the texts."""
    environment = load_environment("causal-v1", num_nodes=4, prompt_style="short", questions_per_graph=1)
    tasks = environment.tasks("train", 200)

    def texts(kind, positions=range(200)):
        rows = demonstrations(environment, tasks.select(positions), kind)
        return [row["completion"][0]["content"] for row in rows]

    return texts


def test_mixed_demonstrations_are_answers_to_about_half_of_the_tasks(demonstrate_questions):
    answers, solutions, mixed = map(demonstrate_questions, ("answer", "solution", "mixed"))
    is_bare = [text == answer for text, answer in zip(mixed, answers, strict=True)]
    assert 80 < sum(is_bare) < 120
    pairs = zip(answers, solutions, is_bare, strict=True)
    assert mixed == [answer if bare else solution for answer, solution, bare in pairs]


def test_mixed_demonstration_of_a_task_does_not_depend_on_its_position(demonstrate_questions):
    second_half = range(199, 99, -1)
    assert demonstrate_questions("mixed", second_half) == demonstrate_questions("mixed")[:99:-1]


@pytest.mark.parametrize("kind", ["solution", "mixed"])
def test_missing_worked_solution_is_a_user_error(kind):
    environment = load_environment(f"{TOY}:Letters")
    with pytest.raises(UserError, match="letters-v1 has no worked solution for task 0-a"):
        demonstrations(environment, environment.tasks("train", 2), kind)


def test_mixed_demonstrations_of_several_turns_are_a_user_error():
    environment = load_environment("search-v3", world_size=200, topk=1)
    with pytest.raises(
        UserError, match=r"mixed is for environments with one turn, but search-v3 .* solution"
    ):
        demonstrations(environment, environment.tasks("train", 2), "mixed")


def test_loss_is_on_the_completion_only(tmp_path, tiny_model, tiny_tokenizer):
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


@pytest.fixture
def demonstrate(tiny_tokenizer):
    """Return a function that calls `scripted_demonstrations` with the tiny tokenizer."""

    def demonstrate(environment, tasks, eos_token_ids=(2,), *, max_completion_length=60, **options):
        return scripted_demonstrations(
            environment,
            tasks,
            tiny_tokenizer,
            list(eos_token_ids),
            max_completion_length=max_completion_length,
            **options,
        )

    return demonstrate


def tokens_in_loss(row):
    return [token for token in row["labels"] if token != -100]


def test_scripts_are_rolled_out_with_replies_outside_the_loss(demonstrate, tiny_tokenizer):
    environment = load_environment(f"{TOY}:Scripted")
    rows = demonstrate(environment, environment.tasks("train", 3))
    prompt = "<|im_start|>user\nSay b!<|im_end|>\n<|im_start|>assistant\n"
    # The loop removes the stop string "e" from the reply.
    assert tiny_tokenizer.decode(rows[1]["input_ids"]) == prompt + "one[b]</>bbb<|im_end|>"
    assert [tiny_tokenizer.decode(tokens_in_loss(row)) for row in rows] == [
        f"one{letter * 3}<|im_end|>" for letter in "abc"
    ]
    assert all(len(row["labels"]) == len(row["input_ids"]) for row in rows)


def test_tasks_without_a_script_or_without_room_are_omitted(demonstrate, caplog):
    environment = load_environment(f"{TOY}:Scripted")
    tasks = environment.tasks("train", 5)
    assert len(demonstrate(environment, tasks)) == 4  # there is no script for the letter "e"
    assert "4 of 5 tasks" in caplog.text
    with pytest.raises(UserError, match="none of 5 tasks has a complete demonstration of at most 5 tokens"):
        demonstrate(environment, tasks, max_completion_length=5)


def test_truncated_scripts_and_those_ended_by_the_environment_are_omitted(demonstrate):
    environment = load_environment(f"{TOY}:Scripted")
    tasks = environment.tasks("train", 3)
    shortest = min(len(row["input_ids"]) for row in demonstrate(environment, tasks))
    assert len(demonstrate(environment, tasks, max_length=shortest)) == 1
    environment.respond = lambda turns: [Reply(done=True) for _ in turns]
    with pytest.raises(UserError, match="none of 3 tasks"):
        demonstrate(environment, tasks)


def test_scripted_turn_ends_with_the_eos_token_of_the_chat_template(demonstrate):
    environment = load_environment(f"{TOY}:Scripted")
    (row,) = demonstrate(environment, environment.tasks("train", 1), [1, 2])  # 1 is <|im_start|>
    assert tokens_in_loss(row)[-1] == 2


def test_error_in_the_environment_is_a_user_error(demonstrate):
    environment = load_environment(f"{TOY}:Scripted")
    environment.respond = lambda turns: 1 / 0
    with pytest.raises(UserError, match=r"3 demonstrations failed; the first: .*ZeroDivisionError"):
        demonstrate(environment, environment.tasks("train", 3))


def save_evaluation(path, *samples):
    """Save an evaluation and return its path; a sample is (task id, score, completion, is_complete)."""
    completions = [
        {
            "task_id": task,
            "score": score,
            "invalid": "the reward failed" if score is None else None,
            "truncated": not is_complete,
            "turns": [{"role": "assistant", "content": text}],
        }
        for task, score, text, is_complete in samples
    ]
    fields = {"name": "x", "model": "m", "environment": "letters-v1", "environment_args": {}}
    fields |= {"split": "train", "seed": 0, "temperature": 1.0, "samples": 2, "metric": "exact"}
    fields |= {"length": 1.0, "truncated": 0.0, "invalid": 0, "pass_at": {}, "avg_at": {}, "rewards": {}}
    fields |= {"breakdown": {}, "scores": {}, "accuracy": Interval(0.5, 0.4, 0.6, 2)}
    Evaluation(**fields, completions=completions).save(path)
    return str(path)


def test_rejection_samples_are_the_best_of_several_samples(demonstrate, tmp_path, tiny_tokenizer):
    environment = load_environment(f"{TOY}:Letters")
    tasks = environment.tasks("train", 6)
    ids = tasks["task_id"]
    path = save_evaluation(
        tmp_path / "a.json",
        (ids[0], 0.2, "ab", True),
        (ids[0], 0.9, "aa", True),
        (ids[0], 1.0, "aaaa", False),  # truncated
        (ids[1], 0.0, "x", True),
        (ids[1], 0.0, "y", True),
        (ids[2], 0.5, "x", True),  # equal scores: none is better
        (ids[2], 0.5, "y", True),
        (ids[3], None, "x", True),
        (ids[4], 0.7, "only", True),
    )
    script = rejection_samples(path, environment)
    assert [script(task) for task in tasks] == [["aa"], None, None, None, ["only"], None]
    rows = demonstrate(environment, tasks, max_completion_length=20, script=script)
    assert len(rows) == 2
    assert tiny_tokenizer.decode(tokens_in_loss(rows[0])) == "aa<|im_end|>"
    assert tiny_tokenizer.decode(rows[0]["input_ids"]).endswith("aa<|im_end|>")


def test_rejection_samples_reject_an_evaluation_of_another_environment(tmp_path):
    path = save_evaluation(tmp_path / "a.json")
    with pytest.raises(UserError, match="evaluates letters-v1, not causal-v1"):
        rejection_samples(path, load_environment("causal-v1"))
