"""Loading rewards, calling all kinds of rewards, and conversion to and from TRL."""

import functools
import inspect
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from rlkit.environment import Environment
from rlkit.errors import RewardError, UserError
from rlkit.registry import REWARDS
from rlkit.reward import RewardCall, TrainerState, as_trl_reward, call_reward
from rlkit.scoring import ErrorBudget, check_columns, load_rewards
from tests.quick import ROOT

LENGTH_REWARDS = {name for name, reference in REWARDS.items() if reference.startswith("rlkit.rewards.")}
CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


def right(completion: str, answer: str, partial: float = 0.0) -> float:
    return 1.0 if completion == answer else partial


def short(completion):
    return len(completion) < 10


class Sums(Environment):
    id = "sums-v1"
    metric = "right"
    rewards = {"right": right, "short": short}  # noqa: RUF012
    reward_weights = {"right": 0.75}  # noqa: RUF012

    def tasks(self, split, n=None, seed=0):
        raise AssertionError("these tests need no tasks")

    def answer(self, task):
        return task["answer"]


def test_call_reward_passes_the_columns_in_the_signature():
    row = {"prompt": CHAT, "completion": "5", "answer": "4", "other": object()}
    assert call_reward(right, row) == 0.0
    assert call_reward(right, {**row, "partial": 0.5}) == 0.5
    assert call_reward(lambda completion, **columns: len(columns), row) == 3.0


def test_call_reward_passes_a_chat_completion_as_a_string():
    messages = [{"role": "assistant", "content": "4"}]
    assert call_reward(right, {"completion": messages, "answer": "4"}) == 1.0


def test_environment_score_calls_all_rewards():
    assert Sums().score({"answer": "4"}, "4") == {"right": 1.0, "short": 1.0}


@pytest.mark.parametrize(
    ("value", "expected"), [(True, 1.0), (2, 2.0), (None, None), (np.float32(0.5), 0.5), (np.array(1), 1.0)]
)
def test_call_reward_converts_numbers_to_float(value, expected):
    assert call_reward(lambda completion: value, {"completion": ""}) == expected


@pytest.mark.parametrize(
    ("value", "error"),
    [("1", TypeError), ([1.0], TypeError), (float("nan"), ValueError), (float("inf"), ValueError)],
)
def test_call_reward_raises_if_the_value_is_not_a_finite_number(value, error):
    with pytest.raises(error, match="returned"):
        call_reward(lambda completion: value, {"completion": ""})


def test_call_reward_runs_async_rewards_in_one_event_loop():
    import asyncio

    async def reward(completion):
        await asyncio.sleep(0)
        return id(asyncio.get_running_loop())

    assert call_reward(reward, {"completion": ""}) == call_reward(reward, {"completion": ""})


def test_group_reward_receives_the_rows_and_the_columns_of_the_task():
    def rank(group, answer):
        return [float(row["completion"] == answer) / len(group) for row in group]

    assert call_reward(rank, {"completion": "4", "answer": "4"}) == 1.0
    trl_reward = as_trl_reward(rank, "rank")
    assert trl_reward(
        prompts=["a", "a", "b"], completions=["4", "5", "4"], answer=["4", "4", "4"]
    ) == [0.5, 0.0, 1.0]  # fmt: skip


def test_call_reward_accepts_trl_rewards():
    row = {"prompt": CHAT, "completion": "<think>\n2 plus 2\n</think>\n4"}
    assert call_reward(think_format_reward, row) == 1.0
    assert call_reward(think_format_reward, {**row, "completion": "4"}) == 0.0
    overlong = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
    assert call_reward(overlong, {"completion": "", "completion_ids": [0] * 8}) == -0.5


def test_trl_reward_receives_messages_only_for_a_chat_prompt():
    def kind(prompts, completions, completion_ids, **columns):
        assert completion_ids == [[7]] and prompts[0] and columns["answer"] == ["4"]
        columns["log_metric"]("calls", 1.0)
        return [1.0 if isinstance(completion, str) else 2.0 for completion in completions]

    row = {"completion": "4", "completion_ids": [7], "answer": "4"}
    assert call_reward(kind, {**row, "prompt": "2 + 2"}) == 1.0
    assert call_reward(kind, {**row, "prompt": CHAT}) == 2.0


def test_as_trl_reward_converts_any_reward():
    reward = as_trl_reward(right, "right")
    completions = [[{"role": "assistant", "content": text}] for text in ("4", "5")]
    extras = {"trainer_state": None, "log_extra": print, "log_metric": print}
    values = reward(
        prompts=[CHAT, CHAT], completions=completions, completion_ids=[[1], [2]], answer=["4", "4"], **extras
    )
    assert values == [1.0, 0.0] and reward.__name__ == "right"
    think = as_trl_reward(think_format_reward, "think")
    assert think(prompts=[CHAT], completions=completions[:1]) == [0.0] and think.__name__ == "think"


def test_as_trl_reward_forwards_the_state_and_what_is_logged():
    def native(completion, trainer_state, log_metric, log_extra):
        log_metric("length", len(completion))
        if completion != "c":
            log_extra("first", [completion[:1]])
        return trainer_state.global_step

    metrics, columns = [], {}
    values = as_trl_reward(native, "native")(
        prompts=["p", "p", "p"],
        completions=["a", "c", "bb"],
        trainer_state=TrainerState(global_step=3),
        log_metric=lambda name, value: metrics.append((name, value)),
        log_extra=columns.__setitem__,
    )
    assert values == [3, 3, 3] and metrics == [("length", 1), ("length", 1), ("length", 2)]
    assert columns == {"first": ["a", None, "b"]}


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("completion, /", "'completion' is positional-only; remove the `/`"),
        ("*args", "takes \\*args, but columns are passed by keyword"),
        ("completion, *args", "takes \\*args"),
    ],
)
def test_rewards_that_cannot_be_called_by_keyword_are_rejected(tmp_path, signature, message):
    (tmp_path / "mine.py").write_text(f"def f({signature}): return 1.0\n")
    with pytest.raises(UserError, match=f"reward '.*f' has no signature that names its columns: .*{message}"):
        load_rewards([f"{tmp_path / 'mine.py'}:f"], Sums())


def test_wrapped_and_keyword_rewards_are_accepted():
    @functools.wraps(right)
    def wrapper(*args, **kwargs):
        return right(*args, **kwargs)

    row = {"completion": "4", "answer": "4", "more": 1}
    assert call_reward(wrapper, row) == 1 and RewardCall(wrapper).required == ["completion", "answer"]
    assert call_reward(lambda *args, **columns: len(args) + len(columns), row) == 3
    assert call_reward(lambda x=3, /, **columns: x, row) == 3
    assert call_reward(lambda: 0.5, row) == 0.5


def test_load_rewards_defaults_to_the_environments_rewards():
    rewards, weights = load_rewards(None, Sums())
    assert rewards == {"right": right} and weights == [0.75]


def test_load_rewards_from_environment_file_and_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def right(completion): return 1\n"
        "half = lambda completion: 0.5\n"
        "class Length:\n"
        "    def __call__(self, completion): return len(completion)\n"
        "class Needy:\n"
        "    def __init__(self, scale): pass\n"
    )
    names = ["right", "short", f"{file}:right", f"{file}:half", f"{file}:Length"]
    rewards, weights = load_rewards([*names, "trl.rewards:think_format_reward"], Sums())
    assert list(rewards) == ["right", "short", "right_2", "half", "Length", "think_format_reward"]
    assert weights == [0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert call_reward(rewards["Length"], {"completion": "four"}) == 4.0
    with pytest.raises(
        UserError, match=r"Needy' needs 'scale'; set reward_args, e.g. \{.*Needy: \{scale: \.\.\.\}\}"
    ):
        load_rewards([f"{file}:Needy"], Sums())


def test_load_rewards_adds_the_metric_with_weight_0():
    rewards, weights = load_rewards(["short"], Sums(), [2])
    assert list(rewards.items()) == [("short", short), ("right", right)] and weights == [2.0, 0.0]
    assert load_rewards(["short", "right"], Sums(), [2, 1])[1] == [2.0, 1.0]
    rewards, _ = load_rewards(["short"], Sums(), arguments={"right": {"partial": 0.5}})
    assert call_reward(rewards["right"], {"completion": "5", "answer": "4"}) == 0.5


def test_load_rewards_reserves_short_names(tmp_path):
    (tmp_path / "mine.py").write_text("def kimi(completion): return 1\n")
    rewards, weights = load_rewards([f"{tmp_path / 'mine.py'}:kimi", "kimi", "hapo"], Sums())
    assert list(rewards) == ["kimi_2", "kimi", "hapo", "right"] and weights == [1.0, 1.0, 1.0, 0.0]
    for name in LENGTH_REWARDS:
        assert list(load_rewards([name], Sums())[0]) == [name, "right"]


def test_registry_has_a_short_name_for_every_length_reward():
    from rlkit.rewards import length, length_group

    references = set()
    for module in (length, length_group):
        for name, value in vars(module).items():
            if is_length_reward(module, value):
                references.add(f"{module.__name__}:{name}")
    assert references == {REWARDS[name] for name in LENGTH_REWARDS - {"hapo"}}


def test_docs_list_every_short_name():
    page = (ROOT / "docs/rewards/length.md").read_text()
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == LENGTH_REWARDS


def is_length_reward(module, value):
    if not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    reads_length = {"group", "length"} & set(inspect.signature(value).parameters)
    return reads_length and value.__name__ != "standardized_lengths"


def test_load_rewards_binds_arguments_to_functions():
    arguments = {
        "right": {"partial": 0.5},
        "l1_max": {"budget": 1000},
        "soft_overlong": {"max_length": 100},
        "kimi": None,
    }
    rewards, _ = load_rewards(list(arguments), Sums(), arguments=arguments)
    assert list(rewards) == list(arguments)
    row = {
        "completion": "5",
        "answer": "4",
        "partial": 0.9,
        "budget": 1,
        "max_length": 9,
        "length": 90,
        "correct": 1.0,
    }
    assert call_reward(rewards["right"], row) == 0.5
    assert call_reward(rewards["l1_max"], row) == pytest.approx(1.0)
    assert call_reward(rewards["soft_overlong"], row) == -0.5
    call = RewardCall(rewards["l1_max"])
    assert call.required == ["length", "correct"] and call.columns == {"length", "correct", "alpha"}
    assert call.reads_correct and not RewardCall(right).reads_correct
    unpickled = pickle.loads(pickle.dumps(rewards["l1_max"]))
    assert call_reward(unpickled, row) == pytest.approx(1.0)


def test_load_rewards_keeps_the_environments_partial():
    class Bound(Sums):
        rewards = {"right": functools.partial(right, partial=0.25)}  # noqa: RUF012

    row = {"completion": "5", "answer": "4", "partial": 0.9}
    assert call_reward(load_rewards(None, Bound())[0]["right"], row) == 0.25
    rewards, _ = load_rewards(None, Bound(), arguments={"right": {"partial": 0.75}})
    assert call_reward(rewards["right"], row) == 0.75


def test_load_rewards_instantiates_a_class_with_its_arguments(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "class Scaled:\n"
        "    def __init__(self, scale): self.scale = scale\n"
        "    def __call__(self, completion): return self.scale * len(completion)\n"
        "instance = Scaled(1)\n"
        "instance.state_dict = dict\n"
    )
    rewards, _ = load_rewards([f"{file}:Scaled"], Sums(), arguments={f"{file}:Scaled": {"scale": 3}})
    assert call_reward(rewards["Scaled"], {"completion": "ab"}) == 6
    with pytest.raises(UserError, match="is an instance, so reward_args"):
        load_rewards([f"{file}:instance"], Sums(), arguments={f"{file}:instance": {"scale": 3}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kimmi": {}}, r"arguments for 'kimmi'.*did you mean 'kimi'"),
        ({"laser": {}}, "arguments for 'laser', which is not a reward of this run"),
        ({"l1_max": {"alhpa": 1.0}}, r"'l1_max' has no argument 'alhpa' \(did you mean 'alpha'"),
        ({"l1_max": {"length": 5}}, "'l1_max' has no argument 'length'"),
        ({"kimi": {"group": []}}, "'kimi' has no argument 'group'"),
        ({"right": {"completion": ""}}, "'right' has no argument 'completion'"),
        ({"l1_max": {"alpha": "1e-3"}}, "'alpha' of reward 'l1_max' is the string '1e-3'"),
        ({"l1_max": 3}, "arguments of reward 'l1_max' must be a mapping, not 3"),
        ({"hapo": {"wieght": 1.0}}, "'hapo' has no argument 'wieght'.*did you mean 'weight'"),
        ({"hapo": {"weight": 2}}, "reward 'hapo': weight must be between 0 and 1, not 2"),
        ({"hapo": {"weight": "0.5x"}}, "'weight' of reward 'hapo' is the string"),
        ({"hapo": {"weight": [1]}}, "'hapo' cannot be constructed with arguments weight"),
        ({"hapo": {"shape": "round"}}, "reward 'hapo': there is no shape 'round'"),
    ],
)
def test_load_rewards_rejects_bad_arguments_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        load_rewards(["right", "kimi", "l1_max", "hapo"], Sums(), arguments=arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["kimmi"], None, "has no reward 'kimmi' .did you mean 'kimi'"),
        (["rigth"], None, "did you mean 'right'"),
        (["trl.rewards:think_format"], None, "did you mean 'think_format_reward'"),
        (["no_such_package:f"], None, "no module"),
        (["right", "right"], None, "twice"),
        ([], None, "at least one"),
        (["math:pi"], None, "cannot be called"),
        (["right"], [0.5, 0.5], "1 rewards but 2"),
        (["right"], [float("nan")], "finite"),
        (["right"], ["1"], "finite"),
    ],
)
def test_load_rewards_rejects_bad_names_and_weights(names, weights, message):
    with pytest.raises(UserError, match=message):
        load_rewards(names, Sums(), weights)


def test_check_columns_reports_missing_columns():
    check_columns({"right": right, "trl": think_format_reward}, ["prompt", "answer"])
    with pytest.raises(UserError, match=r"'right' needs a column 'answer' \(did you mean 'answers'"):
        check_columns({"right": right}, ["prompt", "answers"])
    with pytest.raises(UserError, match="needs a column 'solution'"):
        check_columns({"f": lambda prompts, completions, solution: None}, ["prompt"])


def test_check_columns_rejects_reserved_columns():
    rewards, _ = load_rewards(["soft_overlong", "think_prune", "kimi", "hapo"], Sums())
    check_columns(rewards, ["prompt", "task_id", "answer"])
    for column in ("length", "correct", "max_length", "truncated", "invalid", "turns"):
        with pytest.raises(UserError, match=f"a column '{column}', which is a reserved name"):
            check_columns(rewards, ["prompt", "answer", column])
    with pytest.raises(UserError, match="'l1_exact' needs a column 'budget'"):
        check_columns(load_rewards(["l1_exact"], Sums())[0], ["prompt", "answer"])
    check_columns(load_rewards(["l1_exact"], Sums(), arguments={"l1_exact": {"budget": 9}})[0], ["answer"])


def test_error_budget_resets_and_runs_out():
    budget = ErrorBudget(limit=0.2, patience=2)
    budget.update(0.5, "Traceback: first", {"completion": "x" * 1000})
    budget.update(0.2)
    budget.update(0.3, "Traceback: second", {"completion": "x" * 1000})
    with pytest.raises(RewardError, match="30% of the rollouts of a batch") as error:
        budget.update(0.3, "Traceback: third")
    assert "second" in str(error.value) and "third" not in str(error.value) and len(str(error.value)) < 600


def test_error_budget_with_limit_1_never_stops_a_run():
    budget = ErrorBudget(limit=1.0, patience=1)
    budget.update(1.0)
    with pytest.raises(UserError, match=r"reward_error_budget must be between 0 and 1, not 1\.1"):
        ErrorBudget(limit=1.1)


def test_importing_scoring_does_not_import_torch():
    code = "import json, sys, rlkit.scoring; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert not {"torch", "transformers", "datasets"} & set(modules)
