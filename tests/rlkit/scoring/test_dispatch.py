"""Reward calls in workers: concurrency, first calls, forks, and which call a failure is blamed on."""

import asyncio
import functools
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import cloudpickle
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.reward import RewardCall
from rlkit.scoring import RewardRunner
from rlkit.scoring.limits import TimeLimits
from tests.waiting import wait_until

# A worker cannot import test modules by name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def rows_of(*completions):
    return [{"completion": completion} for completion in completions]


def scores_of(reward, rows, group_size=1, **options):
    with RewardRunner({"reward": reward}, **options) as runner:
        return runner(rows, group_size)


async def meet(completion, folder, size):
    """Wait until `size` calls run at the same time; return how many did at most."""
    (folder / f"{completion}.running").touch()
    while len(list(folder.glob("*.running"))) < size:
        await asyncio.sleep(0.01)
    return size


def test_async_rewards_run_concurrently(tmp_path):
    # None of the calls can end before all of them run.
    rows = [{"completion": str(i), "folder": tmp_path, "size": 64} for i in range(64)]
    assert scores_of(meet, rows, time_limit=200).values.tolist() == [[64]] * 64


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("maximum", [1, 3])
def test_reward_concurrency_limits_how_many_calls_run(tmp_path, maximum, is_async):
    def enter(completion):
        (tmp_path / completion).touch()
        return len(list(tmp_path.iterdir()))

    def run(completion):
        count = enter(completion)
        time.sleep(0.02)
        (tmp_path / completion).unlink()
        return count

    async def run_async(completion):
        count = enter(completion)
        await asyncio.sleep(0.02)
        (tmp_path / completion).unlink()
        return count

    reward = run_async if is_async else run
    options = {"max_concurrent": {"reward": maximum}, "num_workers": 4}
    counts = scores_of(reward, rows_of(*map(str, range(24))), **options).values
    assert counts.max() <= maximum and counts.min() >= 1


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"rewrad": 1}, "'rewrad', which is not a reward of this run .did you mean 'reward'"),
        ({"reward": 0}, "reward_concurrency of 'reward' must be an integer of at least 1, not 0"),
        ({"reward": 2.5}, "must be an integer of at least 1, not 2.5"),
    ],
)
def test_runner_rejects_wrong_concurrency(limits, message):
    with pytest.raises(UserError, match=message):
        RewardRunner({"reward": lambda completion: 0.0}, max_concurrent=limits)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=40), st.data())
def test_concurrent_replies_reach_their_rows(shared_runner, values, data):
    delays = data.draw(st.lists(st.integers(0, 9), min_size=len(values), max_size=len(values)))
    rows = [{"completion": "", "value": v, "delay": d / 1000} for v, d in zip(values, delays, strict=True)]
    scores = shared_runner(rows, 1)
    assert scores.values.tolist() == [[v, v, v] for v in values] and scores.invalid == [None] * len(values)


async def after_delay(completion, value, delay):
    await asyncio.sleep(delay)
    return value


def at_once(completion, value):
    return value


async def of_batch(completions, value, **kwargs):
    await asyncio.sleep(0.001)
    return value


@pytest.fixture(scope="module")
def shared_runner():
    with RewardRunner({"a": after_delay, "b": at_once, "c": of_batch}, num_workers=2) as runner:
        yield runner


async def misbehave(completion):
    """Fail in the way that the completion names, while other calls wait."""
    await asyncio.sleep(0.2)
    match completion:
        case "loop":
            while True:
                pass
        case "regex":
            re.match(r"(a+)+$", "a" * 50 + "b")
        case "sleep":
            time.sleep(600)
        case "wait":
            await asyncio.sleep(600)
        case "exit":
            os._exit(0)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "sys.exit":
            sys.exit(1)
        case "raise":
            raise ValueError("empty")
        case "cancel":
            raise asyncio.CancelledError
        case "slow":
            await asyncio.sleep(0.5)
        case "fork":
            os.fork()
    return len(completion)


async def misbehave_in_a_subtask(completion):
    return (await asyncio.gather(asyncio.wait_for(misbehave(completion), 100)))[0]


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("sleep", "timed out after 2 s"),
        ("regex", "timed out after 2 s"),
        ("exit", r"worker died (exit status 0)"),
        ("sys.exit", r"worker died (exit status 1)"),
        ("segfault", "worker died (SIGSEGV)"),
    ],
)
def test_failing_subtask_invalidates_only_the_row_of_its_call(completion, reason):
    with RewardRunner({"reward": misbehave_in_a_subtask}, time_limit=2.0) as runner:
        runner(rows_of("warm"), 1)
        scores = runner(rows_of("slow", completion, "a", "slow"), 1)
    assert scores.invalid == [None, f"reward: {reason}", None, None]
    assert scores.values[[0, 2, 3], 0].tolist() == [4, 1, 4]


def test_background_task_of_a_finished_call_does_not_fail_the_calls_that_it_blocks():
    tasks = []

    async def block(marker):
        await asyncio.sleep(0.3)
        if not marker.exists():
            marker.touch()
            time.sleep(600)

    async def reward(completion, marker):
        if completion == "background":
            tasks.append(asyncio.create_task(block(marker)))
            return 1.0
        await asyncio.sleep(0.6)
        return 1.0

    with tempfile.TemporaryDirectory() as folder:
        rows = [{"completion": c, "marker": Path(folder) / "x"} for c in ("warm", "background", *"abc")]
        with RewardRunner({"reward": reward}, time_limit=2.0) as runner:
            runner(rows[:1], 1)
            scores = runner(rows, 1)
    assert scores.invalid == [None] * 5 and scores.values.tolist() == [[1]] * 5


class Unimportable:
    """Can be pickled, but not unpickled in a worker."""

    def __reduce__(self):
        return import_module, ("no_such_module",)


@pytest.mark.parametrize("is_async", [True, False])
def test_column_that_cannot_be_unpickled_makes_its_row_invalid(is_async):
    async def reward_async(completion, column):
        return 1.0

    reward = reward_async if is_async else (lambda completion, column: 1.0)
    rows = [{"completion": "", "column": column} for column in (1, Unimportable(), 2)]
    scores = scores_of(reward, rows)
    assert scores.values[[0, 2], 0].tolist() == [1, 1] and "no_such_module" in scores.invalid[1]


class Broken(Exception):  # noqa: N818
    def __str__(self):
        raise KeyError("message")


@pytest.mark.parametrize("in_process", [True, False])
def test_odd_exceptions_are_failures_of_their_row(in_process):
    def odd(completion):
        if completion == "own cause":
            error = ValueError("own cause")
            raise error from error
        if completion == "broken":
            raise Broken
        if completion == "long":
            raise ValueError("x" * 10**7)
        return 1.0

    odd.in_process = in_process
    scores = scores_of(odd, rows_of("own cause", "broken", "long", "a"))
    reasons = scores.invalid
    assert reasons[:2] == ["reward: ValueError: own cause", "reward: Broken"] and reasons[3] is None
    assert len(reasons[2]) < 2000


def test_signal_without_a_name_is_reported():
    def die(completion):
        os.kill(os.getpid(), signal.SIGRTMIN + 3)

    assert re.fullmatch(r"reward: worker died \(signal \d+\)", scores_of(die, rows_of("a")).invalid[0])


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("loop", "timed out after 2 s"),
        ("regex", "timed out after 2 s"),
        ("sleep", "timed out after 2 s"),
        ("wait", "timed out after 2 s"),
        ("exit", r"worker died \(exit status 0\)"),
        ("segfault", r"worker died \(SIGSEGV\)"),
        ("sys.exit", "SystemExit: 1"),
        ("raise", "ValueError: empty"),
        ("cancel", "CancelledError"),
    ],
)
def test_failing_async_call_invalidates_only_its_row(async_runner, completion, reason):
    async_runner(rows_of("warm"), 1)  # the limit of a first call is longer
    completions = ["slow", "a", completion, "bb", *["slow"] * 20]
    scores = async_runner(rows_of(*completions), 1)
    assert [i for i, reason in enumerate(scores.invalid) if reason is not None] == [2]
    assert re.fullmatch(f"reward: {reason}", scores.invalid[2])
    valid = [i for i in range(len(completions)) if i != 2]
    assert scores.values[valid, 0].tolist() == [len(completions[i]) for i in valid]
    assert scores.error_counts == {"reward": 1}


@pytest.fixture(scope="module")
def async_runner():
    with RewardRunner({"reward": misbehave}, time_limit=2.0) as runner:
        yield runner


def test_fork_in_a_reward_does_not_shift_replies(async_runner):
    def fork(completion):
        os.fork()
        return len(completion)

    def execute(completion):
        names = {}
        exec(completion, names)
        return names["result"]

    for _ in range(3):
        assert scores_of(fork, rows_of("a", "bb", "ccc", "dddd")).values[:, 0].tolist() == [1, 2, 3, 4]
        attack = ["import os; os.fork(); result = 1", *["result = 0"] * 3]
        assert scores_of(execute, rows_of(*attack)).values[:, 0].tolist() == [1, 0, 0, 0]
        scores = async_runner(rows_of("fork", "a", "fork", "slow", "b"), 1)
        assert scores.values[:, 0].tolist() == [4, 1, 4, 4, 1]


def test_forked_children_end():
    def fork(completion):
        return os.fork() or os.getpid()

    with RewardRunner({"reward": fork}) as runner:
        children = [int(pid) for pid in runner(rows_of("a", "b"), 1).values[:, 0]]
        for pid in children:
            wait_until(lambda pid=pid: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert len(set(children)) == 2


def slow_first_call(completion, seconds):
    """Sleep in the first call of a process, as an import or a download would."""
    if not hasattr(sys, "_is_loaded"):
        time.sleep(seconds)
        sys._is_loaded = True
    return os.getpid()


async def slow_first_async_call(completion, seconds):
    return slow_first_call(completion, seconds)


@pytest.mark.parametrize("reward", [slow_first_call, slow_first_async_call])
def test_worker_survives_a_slow_first_call(reward, caplog):
    rows = [{"completion": "", "seconds": 2.5}] * 8
    with RewardRunner({"reward": reward}, time_limit=0.5) as runner, caplog.at_level(logging.WARNING):
        first, second = runner(rows, 1), runner(rows, 1)
    assert first.invalid == second.invalid == [None] * 8
    assert len(np.unique([first.values, second.values])) == 1  # the same process
    assert "the first call of reward 'reward' takes more than" in caplog.text and len(caplog.records) == 1


def test_first_call_that_hangs_is_killed_at_the_start_limit():
    def hang(completion):
        while True:
            pass

    # Only the first of them gets the longer limit: 3 s and 3 times 0.5 s.
    scores = scores_of(hang, rows_of(*"abcd"), time_limit=0.5, start_timeout=3.0)
    assert scores.invalid == ["reward: timed out after 3 s", *["reward: timed out after 0.5 s"] * 3]


def test_limit_of_first_calls_recovers_and_gives_up():
    limits = TimeLimits({"r": 10.0}, start_timeout=300.0)
    assert limits.limit("r", 1, is_first=False) == 10 and limits.limit("r", 8, is_first=False) == 80
    assert limits.limit("r", 1, is_first=True) == 300 and limits.limit("r", 64, is_first=True) == 640
    limits.record_first("r", 3.0)
    assert limits.limit("r", 1, is_first=True) == 22
    for _ in range(2):  # two workers: the machine may be busier than before
        limits.record_timeout_of_first("r", 22)
        assert limits.limit("r", 1, is_first=True) == 300
    limits.record_first("r", 100.0)
    assert limits.limit("r", 1, is_first=True) == 300
    limits.record_timeout_of_first("r", 300)  # it hangs
    for _ in range(2):
        assert limits.limit("r", 1, is_first=True) == 10
        limits.record_timeout_of_first("r", 10)


def count_answers(answers):
    return len(answers)


def test_reward_cannot_change_the_columns_of_the_next_one():
    def clear(completion, answers):
        answers.clear()
        return 0.0

    def clear_group(group):
        for row in group:
            row["answers"].append("x")
        return [0.0] * len(group)

    class Stateful:
        def __call__(self, answers):
            answers.append("y")
            return len(answers)

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    rewards = {
        "clear": clear,
        "count": count_answers,
        "stateful": Stateful(),
        "clear_group": clear_group,
        "batch": lambda completions, answers: [len(values) for values in answers],
    }
    rows = [{"completion": "", "prompt": "", "answers": ["a", "b"]} for _ in range(2)]
    with RewardRunner(rewards) as runner:
        for _ in range(2):
            assert runner(rows, 2).values.tolist() == [[0, 2, 3, 0, 2]] * 2
    assert rows[0]["answers"] == ["a", "b"]


def test_in_process_reward_runs_in_this_process_with_the_batch():
    class Unpicklable:
        in_process = True

        def __init__(self):
            self.lock = threading.Lock()
            self.pids = []

        def __call__(self, prompts, completions):
            self.pids.append(os.getpid())
            return [float(len(completions)), ValueError("too long"), None]

    reward = Unpicklable()
    scores = scores_of(reward, [{"prompt": "", "completion": c} for c in "abc"])
    assert scores.values[0, 0] == 3 and scores.invalid == [None, "reward: ValueError: too long", None]
    assert reward.pids == [os.getpid()]


def test_time_limit_of_a_reward_replaces_that_of_the_config():
    class Patient:
        time_limit = 200.0

        async def __call__(self, completion):
            await asyncio.sleep(1.5)
            return 1.0

    rewards = {"patient": Patient(), "hasty": misbehave}
    with RewardRunner(rewards, time_limit=1.0) as runner:
        runner(rows_of("warm"), 1)
        scores = runner(rows_of("wait", "a"), 1)
    assert scores.values[1].tolist() == [1, 1] and scores.invalid[0] == "hasty: timed out after 1 s"
    assert RewardCall(functools.partial(Patient())).time_limit == 200
    assert RewardCall(functools.partial(Patient())).is_async


def test_call_within_its_own_limit_may_block_the_event_loop():
    class Slow:
        time_limit = 100.0

        async def __call__(self, completion):
            if completion == "block":
                await asyncio.sleep(0.2)
                time.sleep(4)
            return 1.0

    async def hasty(completion):
        if completion == "wait":
            await asyncio.sleep(600)
        return 1.0

    with RewardRunner({"slow": Slow(), "hasty": hasty}, time_limit=1.0) as runner:
        runner(rows_of("warm"), 1)
        scores = runner(rows_of("wait", "block"), 1)
    assert scores.invalid == ["hasty: timed out after 1 s", None] and scores.values[1].tolist() == [1, 1]


@pytest.mark.parametrize("limit", [0, -1, float("inf"), "5"])
def test_wrong_time_limit_of_a_reward_is_rejected(limit):
    def reward(completion):
        return 1.0

    reward.time_limit = limit
    with pytest.raises(UserError, match="the time limit of reward 'reward' must be a positive number"):
        RewardRunner({"reward": reward})


def test_large_calls_to_a_blocked_worker_do_not_block_the_trainer(async_runner):
    """The pipe to the worker holds about 200 kB, and a call that blocks the event loop lets it fill up."""
    async_runner(rows_of("warm"), 1)
    big = "x" * 100_000
    scores = async_runner(rows_of("regex", *[big] * 30), 1)
    assert scores.invalid == ["reward: timed out after 2 s", *[None] * 30]
    assert scores.values[1:, 0].tolist() == [100_000] * 30


def test_sync_reward_may_run_its_own_event_loop():
    def runs_loop(completion):
        return asyncio.run(misbehave(completion))

    def returns_awaitable(completion):
        return misbehave(completion)

    rewards = {"runs_loop": runs_loop, "returns_awaitable": returns_awaitable}
    with RewardRunner(rewards) as runner:
        assert runner(rows_of("a", "bb"), 1).values.tolist() == [[1, 1], [2, 2]]


def test_latency_of_every_call_is_reported():
    async def slow(completion):
        await asyncio.sleep(0.1)
        return 0.0

    with RewardRunner({"slow": slow, "group": lambda group: [0.0] * len(group)}) as runner:
        latencies = runner(rows_of(*"abcd"), 2).latencies
    assert {name: len(seconds) for name, seconds in latencies.items()} == {"slow": 4, "group": 2}
    assert min(latencies["slow"]) >= 0.1


class Service(BaseHTTPRequestHandler):
    """A service that answers with the statuses in its path, one per request, and counts the requests."""

    counts: ClassVar[Counter] = Counter()

    def do_GET(self):
        _, _, statuses = self.path.rpartition("/")
        number = self.counts[self.path]
        self.counts[self.path] += 1
        status = [int(s) for s in statuses.split(",")][min(number, statuses.count(","))]
        if status == 0:  # drop the connection
            self.connection.close()
            return
        self.send_response(status)
        self.send_header("Content-Length", "1")
        self.end_headers()
        self.wfile.write(b"1")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask_urllib(url):
    import urllib.request

    with urllib.request.urlopen(url) as response:
        return float(response.read())


async def ask_httpx(url):
    import httpx

    async with httpx.AsyncClient() as client:
        response = await client.get(url)
        return float(response.raise_for_status().text)


def ask_requests(url):
    import requests

    response = requests.get(url)
    response.raise_for_status()
    return float(response.text)


@pytest.mark.parametrize("ask", [ask_urllib, ask_httpx, ask_requests])
@pytest.mark.parametrize(
    ("statuses", "num_requests", "is_valid"),
    [("503,200", 2, True), ("0,429,200", 3, True), ("500", 4, False), ("401", 1, False), ("404", 1, False)],
)
def test_transient_failures_of_a_service_are_retried(service, ask, statuses, num_requests, is_valid):
    path = f"/{ask.__name__}/{statuses}"
    url = service + path
    scores = scores_of(ask, [{"completion": "", "url": url}], num_retries=3, time_limit=60)
    assert (scores.invalid == [None]) == is_valid
    assert Service.counts[path] == num_requests
    assert scores.values[0, 0] == 1 if is_valid else statuses in scores.invalid[0]


def test_retries_stay_within_the_time_limit_and_can_be_turned_off():
    def fail(completion, log_metric):
        log_metric("attempts", 1)
        raise ConnectionError("down")

    # A failed attempt logs nothing, and the reason is the failure rather than "timed out".
    for options in ({"num_retries": 0}, {"num_retries": 1000, "time_limit": 1.0}):
        with RewardRunner({"fail": fail}, start_timeout=1.0, **options) as runner:
            scores = runner(rows_of("a"), 1)
        assert scores.invalid == ["fail: ConnectionError: down"] and scores.metrics == {}


def test_other_failures_are_not_retried(tmp_path):
    def fail(completion):
        with (tmp_path / completion).open("a") as file:
            file.write("x")
        raise {"value": ValueError, "file": FileNotFoundError, "key": KeyError}[completion]("no")

    scores = scores_of(fail, rows_of("value", "file", "key"))
    assert None not in scores.invalid
    assert [(tmp_path / name).read_text() for name in ("value", "file", "key")] == ["x", "x", "x"]
