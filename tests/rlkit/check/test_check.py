"""A sound environment passes all checks; each broken one fails the check meant for it."""

import json
import random
from pathlib import Path

import datasets
import pytest

from rlkit.check import check_environment, solver_agreement
from rlkit.commands.check import main
from rlkit.environment import Environment, Reply
from rlkit.envs.causal.items import agrees, read_item
from rlkit.errors import UserError
from rlkit.registry import load_environment
from tests.quick import DATA

ITEMS = DATA / "rlcausal"
THIS = str(Path(__file__))


def correct(completion: str, total: int) -> float:
    return float(completion.strip().rpartition(" ")[2] == str(total))


def polite(completion: str, weight: float = 1.0) -> float | None:
    return weight if completion else 0.0


class Sums(Environment):
    id = "sums-v1"
    metric = "correct"
    rewards = {"correct": correct, "polite": polite}  # noqa: RUF012
    reward_weights = {"correct": 0.8, "polite": 0.2}  # noqa: RUF012
    breakdown = ("size",)

    def __init__(self, digits: int = 9):
        self.digits = digits

    def row(self, split, seed, i):
        draw = random.Random(f"{split} {seed} {i}")
        a, b = draw.randrange(10**self.digits), draw.randrange(10**self.digits)
        prompt = [{"role": "user", "content": f"What is {a} + {b}?"}]
        return {"prompt": prompt, "task_id": f"{split}-{a}-{b}", "total": a + b, "size": len(str(a))}

    def tasks(self, split, n=None, seed=0):
        return datasets.Dataset.from_list([self.row(split, seed, i) for i in range(n)])

    def answer(self, task):
        return str(task["total"])

    def solution(self, task):
        return f"The sum is {task['total']}"

    def check_item(self, item):
        prompt, truth = read_item(item)
        if "+" not in prompt[0]["content"]:
            raise UserError("there is no sum")
        return agrees([0.25, 0.75], truth)


class WrongAnswer(Sums):
    def answer(self, task):
        return str(task["total"] + (task["total"] % 3 == 0))


class WrongSolution(Sums):
    def solution(self, task):
        return "I don't know"


class PaysEmpty(Sums):
    rewards = {"correct": correct, "polite": lambda completion: 1.0}  # noqa: RUF012


class PaysGarbage(Sums):
    rewards = {"correct": lambda completion: float(bool(completion))}  # noqa: RUF012
    reward_weights = {"correct": 1.0}  # noqa: RUF012


class Raises(Sums):
    def answer(self, task):
        raise KeyError("total")


class IgnoresSeed(Sums):
    def row(self, split, seed, i):
        return super().row(split, 0, i)


class IgnoresSplit(Sums):
    def row(self, split, seed, i):
        return super().row("all", seed, i)


class ForgetsSeed(Sums):
    def row(self, split, seed, i):
        return super().row(split, random.random(), i)


class CoarseIds(Sums):
    def row(self, split, seed, i):
        return {**super().row(split, seed, i), "task_id": f"{split}-{i // 2}"}


class DependsOnN(Sums):
    def tasks(self, split, n=None, seed=0):
        return datasets.Dataset.from_list([self.row(split, seed, n + i) for i in range(n)])


class OneTooFew(Sums):
    def tasks(self, split, n=None, seed=0):
        return super().tasks(split, n - 1, seed)


class NoPrompt(Sums):
    def tasks(self, split, n=None, seed=0):
        return super().tasks(split, n, seed).remove_columns("prompt")


class TextPrompt(Sums):
    def row(self, split, seed, i):
        return {**super().row(split, seed, i), "prompt": "What?"}


class AssistantLast(Sums):
    def row(self, split, seed, i):
        return {**super().row(split, seed, i), "prompt": [{"role": "assistant", "content": "What?"}]}


class NumberIds(Sums):
    def row(self, split, seed, i):
        return {**super().row(split, seed, i), "task_id": i}


class MissingColumn(Sums):
    rewards = {"correct": lambda completion, sum_: 1.0}  # noqa: RUF012
    reward_weights = {"correct": 1.0}  # noqa: RUF012


class MissingBreakdown(Sums):
    breakdown = ("sizes",)


class UnknownReward(Sums):
    reward_weights = {"corect": 1.0}  # noqa: RUF012


class InfiniteWeight(Sums):
    reward_weights = {"correct": float("inf")}  # noqa: RUF012


class UnknownMetric(Sums):
    metric = "accuracy"


class Unpicklable(Sums):
    def __init__(self):
        super().__init__()
        stream = (x for x in ())
        self.rewards = {"correct": lambda completion, total: correct(completion, total) + (stream is None)}
        self.reward_weights = {"correct": 1.0}


class Dialogue(Sums):
    """Multi-turn environment that replies to "ask" with the sum."""

    max_turns = 2

    def script(self, task):
        return ["ask", self.solution(task)]

    def respond(self, turns):
        replies = []
        for turn in turns:
            asks = turn.messages[-1]["content"] == "ask"
            replies.append(Reply(str(turn.task["total"])) if asks else Reply(done=True))
        return replies


class WrongScript(Dialogue):
    def script(self, task):
        return ["ask", "The sum is 0"]


class FewScripts(Dialogue):
    def script(self, task):
        return super().script(task) if task["total"] % 5 == 0 else None


class NoScripts(Dialogue):
    def script(self, task):
        return None


class LacksScripts(NoScripts):
    requires_scripts = True


class Unsolvable(NoScripts):
    def answer(self, task):
        return None


class Finite(Dialogue):
    """A dataset with these sums; "dev" and "test" do not exist."""

    def __init__(self, sums=3):
        super().__init__()
        self.sums = sums

    def tasks(self, split, n=None, seed=0):
        if split != "train":
            raise UserError(f"there is no split {split!r}")
        rows = [self.row(split, 0, i) for i in range(self.sums)]
        random.Random(seed).shuffle(rows)
        return datasets.Dataset.from_list(rows[:n])


class InFixedOrder(Finite):
    def __init__(self):
        super().__init__(20)

    def tasks(self, split, n=None, seed=0):
        return super().tasks(split, n, 0)


class Empty(Finite):
    def tasks(self, split, n=None, seed=0):
        return super().tasks(split, 1, seed).select([])


class WrongExample(Dialogue):
    """An environment whose examples are not about their tasks."""

    def example(self, task):
        return "I don't know"


class Capped(Sums):
    """An environment that never returns more than half of what is requested."""

    def tasks(self, split, n=None, seed=0):
        return super().tasks(split, max(1, n // 2), seed)


class YesOrNo(Finite):
    def row(self, split, seed, i):
        return {**super().row(split, seed, i), "total": i % 2}


class Fails(Dialogue):
    def respond(self, turns):
        return [Reply(invalid="no backend") for _ in turns]


class Guessable(Dialogue):
    def row(self, split, seed, i):
        return {**super().row(split, seed, i), "total": i % 2}


def failures(environment):
    return {c.name: c.detail for c in check_environment(environment, n=12) if not c.passed}


def test_checks_pass_for_a_sound_environment():
    checks = check_environment(Sums(), n=12)
    assert [c for c in checks if not c.passed] == [] and len(checks) == 16
    assert all(check.detail == "" for check in checks)


def test_checks_pass_for_a_sound_multi_turn_environment():
    assert [c for c in check_environment(Dialogue(), n=12) if not c.passed] == []


@pytest.mark.parametrize(
    ("cls", "check", "detail"),
    [
        (WrongAnswer, "the reference answer earns the maximum reward", "correct 0.0 and reward 0.2 of 1"),
        (WrongSolution, "the worked solution earns the maximum reward", "I don't know"),
        (PaysEmpty, "an empty answer earns nothing", "reward 0.2"),
        (PaysGarbage, "a garbage answer is not correct", "correct 1.0"),
        (WrongScript, "the reference script earns the maximum reward", "correct 0.0 and reward 0.2 of 1"),
        (FewScripts, "the reference script earns the maximum reward", "of 12 tasks have no script"),
        (LacksScripts, "the reference script earns the maximum reward", "12 of 12 tasks have no script"),
        (Unsolvable, "the reference script earns the maximum reward", "neither a reference answer nor a scr"),
        (Fails, "the reference script earns the maximum reward", "no backend"),
        (WrongExample, "examples earn more than those of other tasks", "on average"),
        (Guessable, "the most frequent answer is rarely correct", "'0' is correct for 6 of 12 tasks"),
        (Raises, "the reference answer earns the maximum reward", "task 0 (train-"),
        (IgnoresSeed, "another seed gives different tasks", "seeds 0 and 1"),
        (IgnoresSplit, "a task id names one task in one split", "is in train and in dev"),
        (ForgetsSeed, "the same seed gives the same tasks", "differs in prompt"),
        (CoarseIds, "a task id names one task in one split", "train-0 names two tasks of train"),
        (DependsOnN, "tasks do not depend on how many are requested", "task 0"),
        (OneTooFew, "the number of tasks is as requested", "requested 12 tasks, got 11"),
        (Capped, "the number of tasks is as requested", "got 6; requested 24, got 12"),
        (Empty, "the number of tasks is as requested", "requested 12 tasks, got 0"),
        (InFixedOrder, "another seed gives different tasks", "seeds 0 and 1"),
        (NoPrompt, "tasks have all required columns", "no column 'prompt'"),
        (TextPrompt, "prompts are chats and task ids are strings", "not a list of messages"),
        (AssistantLast, "prompts are chats and task ids are strings", "must be the user's, got role 'assis"),
        (NumberIds, "prompts are chats and task ids are strings", "must be a non-empty string, got 0"),
        (MissingColumn, "tasks have all required columns", "needs a column 'sum_'"),
        (MissingBreakdown, "tasks have all required columns", "'sizes'"),
        (UnknownReward, "rewards and weights are valid", "did you mean 'correct'"),
        (InfiniteWeight, "rewards and weights are valid", "finite"),
        (UnknownMetric, "rewards and weights are valid", "the metric 'accuracy' of sums-v1 is not one of"),
        (Unpicklable, "rewards can be pickled", "generator"),
    ],
)
def test_broken_environment_fails_its_check(cls, check, detail):
    assert detail in failures(cls())[check]


def skipped(environment, n=12):
    checks = check_environment(environment, n=n)
    assert [check for check in checks if not check.passed] == []
    return {check.name: check.detail for check in checks if not check.applies}


def test_script_is_not_required_of_tasks_with_an_answer():
    assert skipped(NoScripts()) == {"the reference script earns the maximum reward": "no task has a script"}


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 7, 8, 11])
def test_small_dataset_passes_the_checks_that_apply(num_tasks):
    names = skipped(Finite(num_tasks))
    assert ("another seed gives different tasks" in names) == (num_tasks < 4)
    assert ("the most frequent answer is rarely correct" in names) == (num_tasks < 8)
    assert "there is no split 'dev'" in names["a task id names one task in one split"]


def test_guess_does_not_apply_to_a_small_dataset_with_few_answers():
    assert skipped(YesOrNo(10))["the most frequent answer is rarely correct"].endswith(
        "fewer than 5 distinct answers"
    )
    # With as many tasks as requested, the dataset is large enough to say that guessing is often right.
    assert failures(YesOrNo(12))["the most frequent answer is rarely correct"].endswith("6 of 12 tasks")


def test_few_requested_tasks_of_a_large_set_are_checked():
    assert skipped(Dialogue(), n=1) == {
        "the most frequent answer is rarely correct": "there are fewer than 8 tasks"
    }
    detail = {check.name: check.detail for check in check_environment(IgnoresSeed(), n=2)}
    assert detail["another seed gives different tasks"] == "seeds 0 and 1 give the same tasks"


def test_command_prints_why_a_check_does_not_apply(capsys):
    assert main([f"{THIS}:Finite"]) == 0
    out = capsys.readouterr().out
    assert (
        "skip  the most frequent answer is rarely correct: does not apply because there are fewer than 8"
        in out
    )
    assert main([f"{THIS}:Finite", "--json"]) == 0
    results = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    result = results["another seed gives different tasks"]
    assert (
        result["passed"] is True and result["applies"] is False and "fewer than 4 tasks" in result["detail"]
    )


def test_task_may_be_drawn_twice():
    assert "a task id names one task in one split" not in failures(Sums(digits=0))


def test_command_prints_one_line_per_check(capsys):
    assert main([f"{THIS}:Sums", "-n", "8", "--environment_args.digits", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and all(line.startswith("ok ") for line in lines)
    assert main([f"{THIS}:WrongSolution", "-n", "8", "--split", "test"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  the worked solution earns the maximum reward: task 0 (test-" in out


def test_command_prints_json(capsys):
    assert main([f"{THIS}:UnknownMetric", "--json", "--environment_args", '{"digits": 7}']) == 1
    first = json.loads(capsys.readouterr().out)[0]
    assert first["passed"] is False and "accuracy" in first["detail"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sums"], "no environment"),
        ([f"{THIS}:Sum"], "did you mean 'Sums'"),
        ([f"{THIS}:Sums", "--environment_args.digit", "1"], "did you mean 'digits'"),
        ([f"{THIS}:Sums", "--environment_args.digits"], "needs a value"),
        ([f"{THIS}:Sums", "--environment_args", "{digits"], "must be a mapping such as"),
        ([f"{THIS}:Sums", "-n", "0"], "at least 1"),
        ([f"{THIS}:Sums", "--items", "absent.jsonl"], "cannot read absent.jsonl: No such file or directory$"),
        ([f"{THIS}:Sums", "--seed", "-1"], "--seed must be at least 0"),
        (["math-v1", "--environment_args", "{dataset: absent.jsonl}"], "there is no file absent.jsonl"),
    ],
)
def test_command_rejects_bad_input(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


CHAT = [{"role": "user", "content": "1 + 1"}]


def write(tmp_path, *items):
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items))
    return str(file)


def test_solver_agreement_tolerates_one_hundredth(tmp_path, capsys):
    items = [
        {"prompt": CHAT, "ground_truth": [0.25, 0.75]},
        "",
        {"prompt": CHAT, "reward_model": {"ground_truth": [0.26, 0.74]}},
        {"prompt": CHAT, "ground_truth": [0.27, 0.73]},
        {"prompt": CHAT, "ground_truth": [0.25, 0.75, 0.0]},
        {"prompt": [{"role": "user", "content": "?"}], "ground_truth": [1.0]},
    ]
    assert main([f"{THIS}:Sums", "--json", "--items", write(tmp_path, *items)]) == 0
    failed = [{"line": 6, "reason": "there is no sum"}]
    result = json.loads(capsys.readouterr().out)
    assert result == {"agreement": 0.4, "agree": 2, "total": 5, "failed": failed}
    assert main([f"{THIS}:Sums", "--items", write(tmp_path, *items)]) == 0
    assert "2 of 5 answers agree (40.0%)\nline 6: there is no sum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no items"),
        (["", "{"], ":2: not valid JSON"),
        (["[]"], ":1: not a JSON object"),
        ([{"prompt": CHAT}], ":1: there is no field 'ground_truth'"),
        ([{"prompt": 3, "ground_truth": [1.0]}], ":1: prompt must be"),
        ([{"prompt": CHAT, "ground_truth": [1.5]}], ":1: ground_truth must be"),
        ([{"prompt": CHAT, "ground_truth": "0.5"}], ":1: ground_truth must be"),
    ],
)
def test_solver_agreement_rejects_bad_items(tmp_path, items, message):
    with pytest.raises(UserError, match=message):
        solver_agreement(Sums(), write(tmp_path, *items))


def test_solver_agreement_needs_a_solver(tmp_path):
    class NoSolver(Sums):
        check_item = Environment.check_item

    with pytest.raises(UserError, match="no solver"):
        solver_agreement(NoSolver(), write(tmp_path, {"prompt": CHAT, "ground_truth": [1.0]}))


def test_checks_pass_for_causal_v1():
    checks = check_environment(load_environment("causal-v1"), n=16)
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("level", ["observational", "interventional", "counterfactual"])
def test_causal_solver_agrees_with_published_answers(level):
    file = ITEMS / f"{level}.jsonl"
    if not file.exists():
        pytest.skip(f"the RLCausal items are not at {file}")
    result = solver_agreement(load_environment("causal-v1"), str(file))
    assert result.total == 150 and result.failed == [] and result.agreement >= 0.998
