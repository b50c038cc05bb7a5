"""Fair scheduling of search requests: worker threads search for a few queries of each request in turn.

A request of thousands of queries would otherwise occupy a thread until it is complete, and all others would
wait for it. Requests with few queries are searched for together, which saves switches between threads.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from rlkit.retrieval.documents import EngineError, Query, SearchEngine
from rlkit.retrieval.server_requests import RequestError, RetrieveRequest, encode_result

logger = logging.getLogger(__name__)

# For engines without `chunk_size`. Exact dense search reads all vectors for each call: few, large calls.
DEFAULT_CHUNK_SIZE = 512
MAX_LISTED_FAILURES = 10


@dataclass(eq=False)
class Job:
    """A request in progress.

    Attributes:
        request: The request.
        response: Future of the response body; its exception is a RequestError.
        start: Position of the first query that no thread has taken.
        rankings: JSON of the documents of each query that was searched for, by its position.
        failures: Reasons of the queries that failed, by their positions.
    """

    request: RetrieveRequest
    response: asyncio.Future[bytes]
    start: int = 0
    rankings: dict[int, bytes] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def finish_if_complete(self) -> None:
        """Set the response if all queries were searched for."""
        num_queries = len(self.request.queries)
        if len(self.rankings) + len(self.failures) < num_queries:
            return
        if self.failures:
            # The protocol has no error per query, and an empty list would hide one.
            listed = [f"queries[{i}]: {self.failures[i]}" for i in sorted(self.failures)]
            omitted = ["…"] if len(listed) > MAX_LISTED_FAILURES else []
            reasons = "; ".join(listed[:MAX_LISTED_FAILURES] + omitted)
            reason = f"the search failed for {len(listed)} of {num_queries} queries: {reasons}"
            self.response.set_exception(RequestError(502, reason))
        else:
            rankings = b",".join(self.rankings[i] for i in range(num_queries))
            self.response.set_result(b'{"result":[' + rankings + b"]}")


@dataclass(frozen=True)
class Chunk:
    """Consecutive queries of a job, which a thread has taken.

    Attributes:
        job: The job.
        positions: Positions of the queries in the request.
    """

    job: Job
    positions: range


@dataclass
class Outcome:
    """What a thread has to report about a chunk.

    Attributes:
        chunk: The chunk.
        rankings: JSON of the documents of the queries that succeeded, by their positions.
        failures: Reasons of the queries that failed, by their positions.
        error: Failure of the entire chunk, or None.
    """

    chunk: Chunk
    rankings: dict[int, bytes] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    error: RequestError | None = None


class Scheduler:
    """Search for the queries of many requests in a fixed number of threads.

    Args:
        engine: Search engine; it is called from all threads. Its attribute `chunk_size`, if there is one, is
            the number of queries to pass to it at once.
        num_threads: Number of threads.
    """

    def __init__(self, engine: SearchEngine, num_threads: int):
        self._engine = engine
        self._chunk_size: int = getattr(engine, "chunk_size", DEFAULT_CHUNK_SIZE)
        self._jobs: deque[Job] = deque()
        self._condition = threading.Condition()
        self._is_closed = False
        for _ in range(num_threads):
            threading.Thread(target=self._run, name="rlkit-search", daemon=True).start()

    async def search(self, request: RetrieveRequest) -> bytes:
        """Return the body of the response.

        Cancellation, for example by a timeout, drops the queries that no thread has taken yet.

        Raises:
            RequestError: The search failed (502), or the engine has a bug (500).
        """
        if not request.queries:
            return b'{"result":[]}'
        job = Job(request, asyncio.get_running_loop().create_future())
        with self._condition:
            self._jobs.append(job)
            self._condition.notify()
        return await job.response

    def close(self) -> None:
        """Let the threads end after their current chunks."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._is_closed or self._jobs):
                    self._condition.wait()
                if self._is_closed:
                    return
                chunks = self._take()
            if chunks:
                outcomes = self._search(chunks)
                with suppress(RuntimeError):  # the event loop was closed
                    loop = chunks[0].job.response.get_loop()
                    loop.call_soon_threadsafe(self._report, outcomes)

    def _take(self) -> list[Chunk]:
        """Take at most `chunk_size` queries with the same topk from the front of the queue.

        A job with queries left moves to the end of the queue, so that jobs take turns.
        """
        chunks: list[Chunk] = []
        room = self._chunk_size
        while self._jobs and room:
            job = self._jobs[0]
            if chunks and chunks[0].job.request.topk != job.request.topk:
                break
            self._jobs.popleft()
            if job.response.done():  # timed out or failed
                continue
            stop = min(job.start + room, len(job.request.queries))
            chunks.append(Chunk(job, range(job.start, stop)))
            room -= stop - job.start
            job.start = stop
            if stop < len(job.request.queries):
                self._jobs.append(job)
                break
        if self._jobs:
            self._condition.notify()
        return chunks

    def _search(self, chunks: list[Chunk]) -> list[Outcome]:
        request = chunks[0].job.request
        queries = [Query(chunk.job.request.queries[i]) for chunk in chunks for i in chunk.positions]
        try:
            results = self._engine.search(queries, request.topk)
            if len(results) != len(queries):
                raise RuntimeError(f"the engine returned {len(results)} results for {len(queries)} queries")
            remaining = iter(results)
            outcomes = []
            for chunk in chunks:
                outcome = Outcome(chunk)
                for position, result in zip(chunk.positions, remaining, strict=False):
                    if result.error is not None:
                        outcome.failures[position] = result.error
                    else:
                        return_scores = chunk.job.request.return_scores
                        outcome.rankings[position] = encode_result(result, return_scores)
                outcomes.append(outcome)
            return outcomes
        except Exception as error:
            if len(chunks) > 1:  # other requests must not fail with one
                return [outcome for chunk in chunks for outcome in self._search([chunk])]
            if isinstance(error, EngineError):
                return [Outcome(chunks[0], error=RequestError(502, f"the search failed: {error}"))]
            logger.exception("the search engine raised an unexpected exception")
            reason = f"internal error: {type(error).__name__}"
            return [Outcome(chunks[0], error=RequestError(500, reason))]

    def _report(self, outcomes: list[Outcome]) -> None:
        # In the thread of the event loop: no two threads change a job.
        for outcome in outcomes:
            job = outcome.chunk.job
            if job.response.done():
                continue
            if outcome.error is not None:
                job.response.set_exception(outcome.error)
                continue
            job.rankings |= outcome.rankings
            job.failures |= outcome.failures
            job.finish_if_complete()
