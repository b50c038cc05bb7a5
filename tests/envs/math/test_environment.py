"""`MathEnvironment`: arguments, prompts, budgets, and that it is sound."""

import pickle

import pytest

from rlkit.check import check_environment
from rlkit.envs.math import MathEnvironment
from rlkit.errors import UserError
from rlkit.registry import load_environment

OWN = [
    {},
    {"prompt_style": "short", "solution_style": "mixed", "terms": [2, 5]},
    {"operations": ["+", "-", "*"], "terms": 4, "solution_style": "verbose"},
    {"kind": ["story", "expression"], "operations": ["+", "-"], "budget": [10, 50]},
    {"comparison": "math"},
]


@pytest.mark.parametrize("arguments", OWN)
def test_it_is_sound(arguments):
    checks = check_environment(load_environment("math-v1", **arguments), n=40)
    assert [check for check in checks if not check.passed] == []


def test_a_task():
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


def test_prompts():
    def prompt(**arguments):
        return MathEnvironment(**arguments).tasks("train", 1)[0]["prompt"]

    problem = "What is 11 + 9 + 12?"
    haps = r"Please reason step by step, and put your final answer within \boxed{}."
    user = {"role": "user", "content": problem}
    assert prompt() == [{"role": "system", "content": haps}, user]
    assert prompt(system_prompt="Be brief.") == [{"role": "system", "content": "Be brief."}, user]
    assert prompt(system_prompt="") == [user]
    short = prompt(prompt_style="short", system_prompt="Be brief.")
    assert [message["role"] for message in short] == ["system", "user"]


@pytest.mark.parametrize(
    ("kind", "words"), [("exact", "Think for {} tokens."), ("max", "Think for maximum {} tokens.")]
)
def test_budgets_are_drawn_once_for_a_task_and_stand_in_the_prompt(kind, words):
    environment = MathEnvironment(budget=[20, 60], budget_kind=kind, prompt_style="short", max_number=3)
    tasks = [*environment.tasks("train", 300), *environment.tasks("train", 300, seed=1)]
    budgets = {}
    for task in tasks:
        assert 20 <= task["budget"] <= 60
        assert task["prompt"][-1]["content"].endswith(r"Answer in \boxed{}. " + words.format(task["budget"]))
        assert budgets.setdefault(task["task_id"], task["budget"]) == task["budget"]
    spread = [task["budget"] for task in MathEnvironment(budget=[20, 60]).tasks("train", 2000)]
    assert set(spread) == set(range(20, 61))
    assert sum(spread) / len(spread) == pytest.approx(40, abs=1)
    assert "budget" not in MathEnvironment().tasks("train", 1).column_names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "storey"}, "did you mean 'story'"),
        ({"kind": []}, "kind is empty"),
        ({"operations": ["/"]}, "no operations '/'"),
        ({"terms": 1}, "from 2 to 20"),
        ({"terms": [4, 2]}, "the least comes first"),
        ({"terms": [2, 3, 4]}, "two whole numbers"),
        ({"max_number": 0}, "max_number is 0"),
        ({"kind": "story", "operations": ["*"]}, "cannot tell products"),
        ({"solution_style": "long"}, "no solution_style 'long'"),
        ({"prompt_style": "official"}, "prompt_style"),
        ({"budget": [0, 5]}, "budget is 0"),
        ({"budget": [5]}, "two whole numbers"),
        ({"budget": [1, 2], "budget_kind": "least"}, "budget_kind"),
        ({"comparison": "text"}, "no comparison 'text'"),
        ({"bad_rows": "skip"}, "bad_rows"),
        ({"fractions": [1, 0]}, "three numbers"),
        ({"fractions": [0, 0, 0]}, "all 0"),
        ({"problem_column": "question"}, "give dataset"),
        ({"dataset": "x.jsonl", "breakdown_columns": ["answer"]}, "column of every task"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words):
    with pytest.raises(UserError, match=words):
        MathEnvironment(**arguments)


def test_bad_requests():
    environment = MathEnvironment()
    with pytest.raises(UserError, match="did you mean 'train'"):
        environment.tasks("trian")
    with pytest.raises(UserError, match="n is 0"):
        environment.tasks("train", 0)
    assert len(environment.tasks("dev")) == 1000


def test_it_can_be_pickled():
    environment = pickle.loads(pickle.dumps(MathEnvironment()))
    assert environment.tasks("test", 3)[2] == MathEnvironment().tasks("test", 3)[2]
