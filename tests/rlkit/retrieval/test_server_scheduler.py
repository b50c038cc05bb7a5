"""Scheduling of search requests: fairness, and failures that concern one request only."""

import asyncio
import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.retrieval.documents import Document, EngineError, Result
from rlkit.retrieval.server_requests import RequestError, RetrieveRequest
from rlkit.retrieval.server_scheduler import Scheduler


class SteppedEngine:
    """Engine that returns one document per query, named after it, in calls that the test permits one by one.

    Args:
        chunk_size: Number of queries that the scheduler should pass at once.
        num_permits: Number of calls that need no permit.
    """

    def __init__(self, chunk_size, num_permits=0):
        self.chunk_size, self.calls = chunk_size, []
        self.permits, self.started = threading.Semaphore(num_permits), threading.Semaphore(0)

    def search(self, queries, k):
        texts = [query.text for query in queries]
        self.calls.append((texts, k))
        self.started.release()
        self.permits.acquire()
        if "broken" in texts:
            raise EngineError("the index is gone")
        if "bug" in texts:
            raise ValueError("a bug")
        if "short" in texts:
            return []
        return [
            Result(error="no answer") if text.startswith("failed") else Result((Document(text, "", f"{k}"),))
            for text in texts
        ]


def ids(body):
    return [[document["id"] for document in ranking] for ranking in json.loads(body)["result"]]


def request(*queries, topk=3):
    return RetrieveRequest(list(queries), topk, return_scores=False)


async def in_thread(function):
    return await asyncio.get_running_loop().run_in_executor(None, function)


def run(coroutine_function, engine, num_threads=1):
    """Run a test with a scheduler, and fail rather than hang."""
    scheduler = Scheduler(engine, num_threads)
    try:
        asyncio.run(asyncio.wait_for(coroutine_function(scheduler), 60))
    finally:
        scheduler.close()
        engine.permits.release(1000)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_short_request_overtakes_long_ones(num_threads):
    engine = SteppedEngine(chunk_size=4)

    async def test(scheduler):
        long = [asyncio.create_task(scheduler.search(request(*map(str, range(400))))) for _ in range(8)]
        for _ in range(num_threads):
            await in_thread(engine.started.acquire)
        short = asyncio.create_task(scheduler.search(request("short one", topk=5)))
        await asyncio.sleep(0)  # it is in the queue now
        while not short.done():
            engine.permits.release()
            await in_thread(engine.started.acquire)
        assert ids(short.result()) == [["short one"]]
        # At most one chunk of each long request came first.
        assert len(engine.calls) <= 8 + 2 * num_threads + 1
        assert not any(task.done() for task in long)
        engine.permits.release(900)
        for task in long:
            assert ids(await task) == [[str(i)] for i in range(400)]

    run(test, engine, num_threads)


def test_long_request_is_not_starved_by_short_ones():
    engine = SteppedEngine(chunk_size=2)

    async def test(scheduler):
        long = asyncio.create_task(scheduler.search(request(*map(str, range(10)))))
        await in_thread(engine.started.acquire)
        short = []
        while not long.done():
            short += [asyncio.create_task(scheduler.search(request(f"short {i}"))) for i in range(2)]
            await asyncio.sleep(0)
            engine.permits.release()
            await in_thread(engine.started.acquire)
            assert len(engine.calls) < 40
        assert ids(long.result()) == [[str(i)] for i in range(10)]
        engine.permits.release(100)
        await asyncio.gather(*short)

    run(test, engine)


def test_short_requests_with_same_topk_share_a_call():
    engine = SteppedEngine(chunk_size=8)

    async def test(scheduler):
        first = asyncio.create_task(scheduler.search(request("first")))
        await in_thread(engine.started.acquire)
        others = [asyncio.create_task(scheduler.search(request(f"q{i}"))) for i in range(5)]
        others.append(asyncio.create_task(scheduler.search(request("other topk", topk=9))))
        await asyncio.sleep(0)
        engine.permits.release(3)
        bodies = await asyncio.gather(first, *others)
        assert [ids(body) for body in bodies] == [
            [["first"]],
            *([[f"q{i}"]] for i in range(5)),
            [["other topk"]],
        ]
        assert engine.calls == [(["first"], 3), ([f"q{i}" for i in range(5)], 3), (["other topk"], 9)]

    run(test, engine)


@pytest.mark.parametrize(
    ("query", "status", "reason"),
    [
        ("broken", 502, "the search failed: the index is gone"),
        ("failed", 502, r"the search failed for 1 of 1 queries: queries\[0\]: no answer"),
        ("bug", 500, "internal error: ValueError"),
        ("short", 500, "internal error: RuntimeError"),
    ],
)
def test_failure_does_not_spread_to_requests_of_the_same_call(query, status, reason):
    engine = SteppedEngine(chunk_size=8)

    async def test(scheduler):
        first = asyncio.create_task(scheduler.search(request("first")))
        await in_thread(engine.started.acquire)
        others = [asyncio.create_task(scheduler.search(request(text))) for text in ("a", query, "b")]
        await asyncio.sleep(0)
        engine.permits.release(100)
        assert ids(await first) == [["first"]]
        assert ids(await others[0]) == [["a"]] and ids(await others[2]) == [["b"]]
        with pytest.raises(RequestError, match=reason) as caught:
            await others[1]
        assert caught.value.status == status

    run(test, engine)


def test_error_names_failed_queries_of_all_chunks():
    engine = SteppedEngine(chunk_size=3, num_permits=10_000)

    async def test(scheduler):
        queries = [f"failed {i}" if i in (1, 7) else f"q{i}" for i in range(10)]
        with pytest.raises(RequestError) as caught:
            await scheduler.search(request(*queries))
        reason = "the search failed for 2 of 10 queries: queries[1]: no answer; queries[7]: no answer"
        assert (caught.value.status, caught.value.reason) == (502, reason)
        with pytest.raises(RequestError) as caught:
            await scheduler.search(request(*["failed"] * 2560))
        assert "2560 of 2560" in caught.value.reason and len(caught.value.reason) < 500

    run(test, engine, num_threads=2)


def test_cancelled_request_is_not_searched_further():
    engine = SteppedEngine(chunk_size=2)

    async def test(scheduler):
        long = asyncio.create_task(scheduler.search(request(*map(str, range(100)))))
        await in_thread(engine.started.acquire)
        long.cancel()
        await asyncio.wait([long])
        assert long.cancelled()
        engine.permits.release(100)
        assert ids(await scheduler.search(request("next"))) == [["next"]]
        assert [texts for texts, _ in engine.calls] == [["0", "1"], ["next"]]

    run(test, engine)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 2)), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_every_request_gets_its_own_results_in_order(sizes, chunk_size, num_threads):
    engine = SteppedEngine(chunk_size, num_permits=10_000)

    async def test(scheduler):
        queries = [[f"{i}-{j}" for j in range(size)] for i, (size, _) in enumerate(sizes)]
        searches = [
            scheduler.search(request(*texts, topk=topk))
            for texts, (_, topk) in zip(queries, sizes, strict=True)
        ]
        bodies = await asyncio.gather(*searches)
        assert [ids(body) for body in bodies] == [[[text] for text in texts] for texts in queries]
        assert all(len(texts) <= chunk_size for texts, _ in engine.calls)

    run(test, engine, num_threads)
