"""Running rewards in real processes: one that hangs, crashes or fails makes only its own row invalid."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import cloudpickle
import datasets
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.rewards import think_format_reward

from rlkit.environment import Environment
from rlkit.errors import RewardError, UserError
from rlkit.reward import call_reward
from rlkit.rollouts import Rollout
from rlkit.scoring import RewardRunner, load_rewards
from rlkit.scoring.load import load_object
from tests.waiting import wait_until

# A worker cannot import test modules by name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

CHAT = [{"role": "user", "content": "Misbehave."}]


def rows_of(*completions):
    return [{"prompt": CHAT, "completion": c, "truth": [0.5, 0.5]} for c in completions]


def misbehave(completion: str):
    """Fail in the way that the completion names."""
    match completion:
        case "loop":
            while True:
                pass
        case "sleep":
            time.sleep(60)
        case "regex":
            re.match(r"(a+)+$", "a" * 50 + "b")
        case "exit":
            os._exit(0)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "sys.exit":
            sys.exit(1)
        case "memory":
            raise MemoryError
        case "raise":
            raise ValueError("empty answer\nand more")
        case "text":
            return "1.0"
        case "nan":
            return float("nan")
        case "none":
            return None
    return len(completion)


def length(completion):
    return len(completion)


def scaled(completion, share, offset=0.5):
    return share * len(completion) + offset if completion else None


@pytest.fixture(scope="module")
def random_runner():
    with RewardRunner({"length": length, "scaled": scaled}) as runner:
        yield runner


@pytest.fixture(scope="module")
def runner():
    with RewardRunner({"length": length, "misbehave": misbehave}, time_limit=1.0) as runner:
        yield runner


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("loop", r"misbehave: timed out after 1 s"),
        ("sleep", r"misbehave: timed out after 1 s"),
        ("regex", r"misbehave: timed out after 1 s"),
        ("exit", r"misbehave: worker died \(exit status 0\)"),
        ("segfault", r"misbehave: worker died \(SIGSEGV\)"),
        ("sys.exit", "misbehave: SystemExit: 1"),
        ("memory", "misbehave: MemoryError"),
        ("raise", "misbehave: ValueError: empty answer"),
        ("text", "misbehave: TypeError: returned '1.0', which is not a number"),
        ("nan", "misbehave: ValueError: returned nan"),
    ],
)
def test_runner_invalidates_only_the_row_that_fails(runner, completion, reason):
    started = time.monotonic()
    scores = runner(rows_of("a", "bb", completion, "dddd"), group_size=2)
    assert time.monotonic() - started < 10
    assert scores.values[[0, 1, 3]].tolist() == [[1, 1], [2, 2], [4, 4]]
    assert np.isnan(scores.values[2]).all()
    assert scores.invalid[2] is not None and re.fullmatch(reason, scores.invalid[2])
    assert [scores.invalid[i] for i in (0, 1, 3)] == [None] * 3
    assert scores.error_counts == {"misbehave": 1} and scores.first_row == 2


def test_runner_scores_none_as_nan_but_valid(runner):
    scores = runner(rows_of("none"), group_size=1)
    assert scores.invalid == [None] and scores.values[0, 0] == 4 and np.isnan(scores.values[0, 1])
    assert scores.error_counts == {} and scores.first_traceback is None and scores.first_row is None


def test_runner_reports_the_traceback_of_the_first_invalid_row(runner):
    scores = runner(rows_of("a", "raise", "memory", "raise"), group_size=1)
    assert scores.first_row == 1 and 'raise ValueError("empty answer' in scores.first_traceback
    assert scores.error_counts == {"misbehave": 3}


def test_runner_accepts_an_empty_batch(runner):
    assert runner([], group_size=4).values.shape == (0, 2)


def test_runner_rejects_incomplete_groups(runner):
    with pytest.raises(ValueError, match="groups of 2"):
        runner(rows_of("a"), group_size=2)


def test_runner_invalidates_a_row_that_cannot_be_pickled():
    with RewardRunner({"columns": lambda **columns: len(columns)}) as runner:
        rows = [{"completion": "a", "extra": value} for value in (1, lambda: 0, 3)]
        scores = runner(rows, group_size=1)
    assert scores.values[:, 0].tolist()[::2] == [2, 2] and "columns: " in scores.invalid[1]


def test_runner_does_not_pickle_columns_that_no_reward_reads(runner):
    rows = [{**row, "generator": (x for x in ())} for row in rows_of("a")]
    assert runner(rows, group_size=1).invalid == [None]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=8), st.floats(0, 1)), min_size=1, max_size=12))
def test_runner_values_equal_direct_calls(random_runner, pairs):
    rows = [{"completion": text, "share": share} for text, share in pairs]
    values = random_runner(rows, group_size=1).values
    expected = [[call_reward(length, row), call_reward(scaled, row)] for row in rows]
    np.testing.assert_array_equal(values, np.array(expected, dtype=float))


def test_runner_with_several_workers_keeps_the_order_of_rows():
    rows = rows_of(*("x" * (i % 7) for i in range(40)), "loop", "exit", "y")
    with RewardRunner({"misbehave": misbehave}, time_limit=1.0, num_workers=2) as runner:
        scores = runner(rows, group_size=1)
    assert scores.values[:40, 0].tolist() == [i % 7 for i in range(40)] and scores.values[42, 0] == 1
    assert [reason is None for reason in scores.invalid] == [True] * 40 + [False, False, True]


def test_failing_group_reward_invalidates_its_group():
    def rank(group):
        texts = [row["completion"] for row in group]
        return [0.0] if "short" in texts else [float(text == max(texts)) for text in texts]

    with RewardRunner({"length": length, "rank": rank}) as runner:
        scores = runner(rows_of("a", "b", "short", "c"), group_size=2)
    assert scores.values[:2].tolist() == [[1, 0], [1, 1]] and np.isnan(scores.values[2:]).all()
    assert scores.invalid[2:] == ["rank: ValueError: returned 1 values for 2 rollouts"] * 2
    assert scores.error_counts == {"rank": 2}


def with_tokens(rows, **columns):
    """Add `completion_ids` to rows: one token per letter and an EOS token."""
    return [{**row, "completion_ids": [*row["completion"], "<eos>"], **columns} for row in rows]


def right(completion):
    if completion == "fail":
        raise ValueError("the metric failed")
    return None if completion == "?" else float(completion == "yes")


def tokens(length):
    return length


def right_tokens(length, correct):
    if length == 4:
        raise ValueError("four")
    return length * correct


def share_of_group(group):
    return [row["length"] + row["correct"] / len(group) for row in group]


def test_length_excludes_the_eos_token():
    rows = with_tokens(rows_of("yes", ""))
    rows += [
        {"completion": "yes", "completion_ids": [1, 2, 3], "truncated": True},
        {"completion": "", "completion_ids": [], "truncated": True},
        {"completion": "", "completion_ids": [], "truncated": False},
    ]
    with RewardRunner({"tokens": tokens}) as runner:
        assert runner(rows, 1).values[:, 0].tolist() == [3, 0, 3, 0, 0]
        assert "missing" in runner(rows_of("yes"), 1).invalid[0]
    assert "length" not in rows[0]


def test_rewards_that_read_correct_run_after_the_metric():
    rewards = {"right_tokens": right_tokens, "share": share_of_group, "right": right, "tokens": tokens}
    with RewardRunner(rewards, metric="right") as runner:
        scores = runner(with_tokens(rows_of("yes", "no", "yes", "yes")), group_size=2)
    assert scores.values.tolist() == [[3, 3.5, 1, 3], [0, 2, 0, 2], [3, 3.5, 1, 3], [3, 3.5, 1, 3]]


def test_invalid_rows_are_excluded_from_later_stages():
    calls = []

    class Spy:
        def __call__(self, completion, correct):
            calls.append(completion)
            return correct

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    rewards = {"spy": Spy(), "share": share_of_group, "right_tokens": right_tokens, "right": right}
    with RewardRunner(rewards, metric="right") as runner:
        scores = runner(with_tokens(rows_of("fail", "yes", "four", "fail", "fail", "fail")), group_size=2)
    assert scores.values[1].tolist() == [1, 4, 3, 1] and np.isnan(scores.values[[0, 2, 3, 4, 5]]).all()
    assert scores.invalid[2] == "right_tokens: ValueError: four" and scores.invalid[1] is None
    assert scores.error_counts == {"right": 4, "right_tokens": 1} and calls == ["yes"]


def test_rewards_that_read_correct_are_nan_where_the_metric_is_none():
    rewards = {"right": right, "tokens": tokens, "right_tokens": right_tokens, "share": share_of_group}
    with RewardRunner(rewards, metric="right") as runner:
        scores = runner(with_tokens(rows_of("?", "yes", "?", "?")), group_size=2)
    assert scores.invalid == [None] * 4 and scores.error_counts == {}
    assert scores.values[1].tolist() == [1, 3, 3, 4]
    assert scores.values[[0, 2, 3], 1].tolist() == [1, 1, 1]
    assert np.isnan(scores.values[[0, 2, 3]][:, [0, 2, 3]]).all()


def test_failing_group_reward_invalidates_only_the_rows_it_scored():
    def broken(group):
        raise ValueError("no")

    with RewardRunner({"right": right, "broken": broken}, metric="right") as runner:
        scores = runner(with_tokens(rows_of("yes", "fail", "?")), group_size=3)
    assert scores.invalid == ["broken: ValueError: no", "right: ValueError: the metric failed", None]
    assert scores.error_counts == {"right": 1, "broken": 1}


def test_invalid_rows_are_removed_from_their_group_without_a_metric():
    def size(group):
        return [len(group)] * len(group)

    with RewardRunner({"size": size, "misbehave": misbehave}) as runner:
        scores = runner(rows_of("raise", "a", "b"), group_size=3)
    assert scores.values[1:].tolist() == [[2, 1], [2, 1]] and scores.error_counts == {"misbehave": 1}


def test_metric_may_be_a_group_reward_or_stateful():
    def best(group):
        return [float(row["length"] == max(r["length"] for r in group)) for row in group]

    class StatefulMetric:
        def __call__(self, completion):
            return float(completion == "yes")

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    for metric, values in ((best, [[1, 4], [0, 0]]), (StatefulMetric(), [[0, 0], [1, 3]])):
        rewards = {"metric": metric, "tokens": lambda length, correct: length * correct}
        with RewardRunner(rewards, metric="metric") as runner:
            assert runner(with_tokens(rows_of("long", "yes")), 2).values.tolist() == values


def test_trl_reward_can_read_correct():
    rewards = {
        "right": right,
        "trl": lambda completions, correct, length, **kwargs: [10 * correct[0] + length[0]],
    }
    with RewardRunner(rewards, metric="right") as runner:
        assert runner(with_tokens(rows_of("yes")), 1).values.tolist() == [[1, 13]]


@pytest.mark.parametrize(
    ("rewards", "metric", "message"),
    [
        ({"right_tokens": right_tokens}, None, "'right_tokens' reads 'correct', but there is no metric"),
        ({"right": right}, "rigth", "'rigth' is not one of the rewards.*did you mean 'right'"),
        ({"right_tokens": right_tokens}, "right_tokens", "must not read 'correct'"),
    ],
)
def test_runner_rejects_a_bad_metric(rewards, metric, message):
    with pytest.raises(UserError, match=message):
        RewardRunner(rewards, metric=metric)


def test_runner_passes_rollouts_only_to_stateful_rewards():
    class Observer:
        def __init__(self):
            self.rollouts = []

        def __call__(self, length, correct):
            return len(self.rollouts)

        def observe(self, rollouts):
            self.rollouts += rollouts

        def state_dict(self):
            return {"rollouts": self.rollouts}

        def load_state_dict(self, state):
            self.rollouts = state["rollouts"]

    class Stateless:
        def __call__(self, completion):
            return 0.0

        def observe(self, rollouts):
            raise AssertionError

    observer, rollout = Observer(), {"task_id": "a", "length": 3, "correct": 1.0}
    with RewardRunner({"right": right, "observer": observer}, metric="right") as runner:
        assert runner.stateful == {"observer": observer}
        assert runner(with_tokens(rows_of("yes", "no")), 2).values[:, 1].tolist() == [0, 0]
        runner.observe([rollout])
        assert runner(with_tokens(rows_of("yes", "no")), 2).values[:, 1].tolist() == [1, 1]
    assert observer.rollouts == [rollout]
    with pytest.raises(UserError, match="'stateless' defines observe, so it must define state_dict"):
        RewardRunner({"stateless": Stateless()})


def test_worker_runs_rewards_with_bound_arguments():
    class Sums(Environment):
        id, metric = "sums-v1", "right"
        rewards, reward_weights = {"right": right}, {"right": 1.0}
        tasks = answer = None

    names = ["right", "kimi", "l1_max", "hapo"]
    rewards, _ = load_rewards(names, Sums(), arguments={"l1_max": {"budget": 10, "alpha": 0.1}, "hapo": {}})
    rows = with_tokens(
        rows_of("yes", "no", "yes", "fail", "yes", "no", "no", "?"), task_id="a", truncated=False, alpha=9
    )
    with RewardRunner(rewards, metric="right") as runner:
        assert list(runner.stateful) == ["hapo"]
        runner.observe([{"task_id": "a", "length": 3, "correct": 1.0}])
        scores = runner(rows, group_size=4)
    assert scores.values[0].tolist() == pytest.approx([1, -0.5, 0.85, 0])
    assert scores.values[1].tolist() == pytest.approx([0, 0, 0, 0])
    assert scores.invalid[3] and scores.invalid.count(None) == 7


def test_evaluate_passes_max_length_and_does_not_call_observe():
    from rlkit.evaluation import evaluate

    class YesEnvironment(Environment):
        id, metric = "yes-v1", "right"
        rewards, reward_weights = {"right": right}, {"right": 1.0}

        def tasks(self, split, n=None, seed=0):
            return datasets.Dataset.from_list([{"prompt": CHAT, "task_id": str(i)} for i in range(n)])

        def answer(self, task):
            return "yes"

    def generate(prompts, samples):
        return [[Rollout.single("yes", [1, 2, 3, 0], False)] * samples for _ in prompts]

    rewards, _ = load_rewards(["right", "soft_overlong", "hapo"], YesEnvironment())
    options = {"name": "n", "model": "m", "environment_args": {}, "temperature": 0.0, "n": 2}
    with RewardRunner(rewards, metric="right") as runner:
        result = evaluate(generate, YesEnvironment(), runner, max_length=4, **options)
        assert result.rewards == {"right": 1.0, "soft_overlong": 0.0, "hapo": 0.0} and result.invalid == 0
        result = evaluate(generate, YesEnvironment(), runner, max_length=3, **options)
        assert result.rewards["soft_overlong"] == -1
        assert evaluate(generate, YesEnvironment(), runner, **options).invalid == 2
    assert rewards["hapo"].state_dict()["tasks"] == []


def test_stateful_reward_runs_in_the_trainers_process():
    class Best:
        best = 0

        def __call__(self, completion):
            if completion == "raise":
                raise ValueError("no")
            self.best = max(self.best, len(completion))
            return self.best

        def state_dict(self):
            return {"best": self.best}

        def load_state_dict(self, state):
            self.best = state["best"]

    best = Best()
    with RewardRunner({"best": best}) as runner:
        scores = runner(rows_of("aaa", "raise", "b"), group_size=1)
    assert scores.values[[0, 2], 0].tolist() == [3, 3] and best.state_dict() == {"best": 3}
    assert scores.invalid[1] == "best: ValueError: no" and "Traceback" in scores.first_traceback


def test_runner_runs_all_kinds_of_rewards(tmp_path):
    (tmp_path / "mine.py").write_text("SCALE = 2\ndef scaled(completion): return SCALE * len(completion)\n")

    async def asynchronous(completion, truth):
        return sum(truth)

    rewards = {
        "asynchronous": asynchronous,
        "think": think_format_reward,
        "file": load_object(f"{tmp_path / 'mine.py'}:scaled"),
        "text": lambda prompts, completions: [len(completion[0]["content"]) for completion in completions],
    }
    with RewardRunner(rewards) as runner:
        assert runner(rows_of("<think>x</think>y"), 1).values.tolist() == [[1, 1, 34, 17]]


def test_workers_do_not_import_torch():
    with RewardRunner({"torch": lambda completion: "torch" in sys.modules}) as runner:
        assert runner(rows_of("a"), 1).values.tolist() == [[0]]


def has_ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # ended, but its parent has not reaped it
    except psutil.NoSuchProcess:
        return True


def test_close_kills_workers_and_their_children():
    def spawn(completion):
        return subprocess.Popen(["sleep", "3600"]).pid

    before = set(psutil.Process().children())
    runner = RewardRunner({"spawn": spawn}, num_workers=2)
    grandchild = int(runner(rows_of("a"), 1).values[0, 0])
    assert len(set(psutil.Process().children()) - before) == 2
    runner.close()
    runner.close()
    assert set(psutil.Process().children()) == before
    wait_until(lambda: has_ended(grandchild))


def test_runner_replaces_a_worker_that_died_between_batches():
    with RewardRunner({"pid": lambda completion: os.getpid()}) as runner:
        pid = int(runner(rows_of("a"), 1).values[0, 0])
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)], timeout=60)
        assert runner(rows_of("a"), 1).invalid == [None]


@pytest.mark.parametrize(
    "signal_number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_worker_ends_when_the_trainer_is_stopped(signal_number, tmp_path):
    (tmp_path / "train.py").write_text(
        textwrap.dedent("""
        import os
        import signal
        from rlkit.scoring import RewardRunner

        # A background job of a shell ignores SIGINT, and this process would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def hang(completion):
            if completion == "warm":  # the limit of a first call is longer
                return 0.0
            print(os.getpid(), flush=True)
            while True: pass

        with RewardRunner({"hang": hang}, time_limit=LIMIT) as runner:
            runner([{"completion": "warm"}], 1)
            runner([{"completion": "a"}], 1)
        """).replace("LIMIT", "60" if signal_number == signal.SIGINT else "1")
    )
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "train.py")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    worker = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal_number)
    process.wait(timeout=60)
    ended, _ = psutil.wait_procs([worker], timeout=60)
    assert ended


def test_runner_rejects_a_reward_that_cannot_be_pickled():
    import threading

    lock = threading.Lock()
    with pytest.raises(UserError, match="reward 'locked' cannot be pickled"):
        RewardRunner({"locked": lambda completion: lock.locked()})


def test_runner_raises_if_a_worker_cannot_load_a_reward():
    class Unloadable:
        def __reduce__(self):
            return load_object, ("no_such_module:f",)

        def __call__(self, completion):
            return 0.0

    with pytest.raises(RewardError, match="no_such_module"):
        RewardRunner({"unloadable": Unloadable()})


@pytest.mark.parametrize("arguments", [{"time_limit": 0}, {"time_limit": float("inf")}, {"num_workers": 0}])
def test_runner_rejects_limits_that_are_not_positive(arguments):
    with pytest.raises(UserError):
        RewardRunner({"length": length}, **arguments)


def test_runner_has_little_overhead(runner):
    rows = rows_of(*["a" * 2000] * 512)
    started = time.monotonic()
    scores = runner(rows, group_size=8)
    assert time.monotonic() - started < 20  # 0.05 s on an idle core; leaves room for a busy machine
    assert scores.invalid == [None] * 512
