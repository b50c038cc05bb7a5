"""`MathEnvironment`: arguments, tasks, prompts and token budgets."""

import pickle

import pytest

from rlkit.check import check_environment
from rlkit.envs.math import MathEnvironment
from rlkit.errors import UserError
from rlkit.registry import load_environment

ARITHMETIC_ARGUMENTS = [
    {},
    {"prompt_style": "short", "solution_style": "mixed", "terms": [2, 5]},
    {"operations": ["+", "-", "*"], "terms": 4, "solution_style": "verbose"},
    {"kind": ["story", "expression"], "operations": ["+", "-"], "budget": [10, 50]},
    {"comparison": "math"},
]


@pytest.mark.parametrize("arguments", ARITHMETIC_ARGUMENTS)
def test_arithmetic_environment_is_sound(arguments):
    checks = check_environment(load_environment("math-v1", **arguments), n=40)
    assert [check for check in checks if not check.passed] == []


def test_first_task_and_its_scores():
    environment = MathEnvironment(prompt_style="short")
    task = environment.tasks("train", 1)[0]
    assert task == {
        "prompt": [{"role": "user", "content": r"What is 11 + 9 + 12? Answer in \boxed{}."}],
        "task_id": task["task_id"],
        "answer": "32",
        "problem": "What is 11 + 9 + 12?",
        "solution": "11 + 9 = 20\n20 + 12 = 32\n\\boxed{32}",
        "kind": "expression",
        "terms": 3,
    }
    assert environment.score(task, r"\boxed{32}") == {"correct": 1.0, "format": 1.0}
    assert environment.score(task, "11 + 9 = 20\n20 + 12 = 32\n\\boxed{32}") == {
        "correct": 1.0,
        "format": 1.0,
    }
    assert environment.score(task, r"\boxed{33}") == {"correct": 0.0, "format": 1.0}
    assert environment.score(task, r"\boxed{11 + 9 + 12}") == {"correct": 0.0, "format": 1.0}
    assert environment.score(task, "32") == {"correct": 0.0, "format": 0.0}


def test_prompt_style_and_system_prompt_set_the_messages():
    def prompt(**arguments):
        return MathEnvironment(**arguments).tasks("train", 1)[0]["prompt"]

    problem = "What is 11 + 9 + 12?"
    default = r"Please reason step by step, and put your final answer within \boxed{}."
    user = {"role": "user", "content": problem}
    assert prompt() == [{"role": "system", "content": default}, user]
    assert prompt(system_prompt="Be brief.") == [{"role": "system", "content": "Be brief."}, user]
    assert prompt(system_prompt="") == [user]
    short = prompt(prompt_style="short", system_prompt="Be brief.")
    assert [message["role"] for message in short] == ["system", "user"]


@pytest.mark.parametrize(
    ("kind", "sentence"), [("exact", "Think for {} tokens."), ("max", "Think for maximum {} tokens.")]
)
def test_budget_is_fixed_per_task_and_appended_to_the_prompt(kind, sentence):
    environment = MathEnvironment(budget=[20, 60], budget_kind=kind, prompt_style="short", max_number=3)
    tasks = [*environment.tasks("train", 300), *environment.tasks("train", 300, seed=1)]
    budgets = {}
    for task in tasks:
        assert 20 <= task["budget"] <= 60
        assert task["prompt"][-1]["content"].endswith(
            r"Answer in \boxed{}. " + sentence.format(task["budget"])
        )
        assert budgets.setdefault(task["task_id"], task["budget"]) == task["budget"]
    drawn = [task["budget"] for task in MathEnvironment(budget=[20, 60]).tasks("train", 2000)]
    assert set(drawn) == set(range(20, 61))
    assert sum(drawn) / len(drawn) == pytest.approx(40, abs=1)
    assert "budget" not in MathEnvironment().tasks("train", 1).column_names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "storey"}, "did you mean 'story'"),
        ({"kind": []}, "kind is empty"),
        ({"operations": ["/"]}, "unknown operations '/'"),
        ({"terms": 1}, "from 2 to 20"),
        ({"terms": [4, 2]}, "terms must have its minimum first"),
        ({"terms": [2, 3, 4]}, "two integers"),
        ({"max_number": 0}, "max_number must be an integer from 1 to 1000000, not 0"),
        ({"kind": "story", "operations": ["*"]}, "does not support products"),
        ({"solution_style": "long"}, "unknown solution_style 'long'"),
        ({"prompt_style": "official"}, "prompt_style"),
        ({"budget": [0, 5]}, "budget must be an integer from 1 to 1000000, not 0"),
        ({"budget": [5]}, "two integers"),
        ({"budget": [1, 2], "budget_kind": "least"}, "budget_kind"),
        ({"comparison": "text"}, "unknown comparison 'text'"),
        ({"bad_rows": "skip"}, "bad_rows"),
        ({"fractions": [1, 0]}, "three non-negative numbers"),
        ({"fractions": [0, 0, 0]}, "all 0"),
        ({"problem_column": "question"}, "require `dataset`"),
        ({"dataset": "x.jsonl", "breakdown_columns": ["answer"]}, "column of every task"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(UserError, match=message):
        MathEnvironment(**arguments)


def test_tasks_rejects_invalid_split_and_n():
    environment = MathEnvironment()
    with pytest.raises(UserError, match="did you mean 'train'"):
        environment.tasks("trian")
    with pytest.raises(UserError, match="n must be an integer from 1 to 1000000000, not 0"):
        environment.tasks("train", 0)
    assert len(environment.tasks("dev")) == 1000


def test_environment_pickles():
    environment = pickle.loads(pickle.dumps(MathEnvironment()))
    assert environment.tasks("test", 3)[2] == MathEnvironment().tasks("test", 3)[2]
