"""Search server for tests: it runs in a thread on a free port, over a dictionary of documents."""

import socket
import threading
import time
from contextlib import contextmanager

from rlkit.retrieval.documents import Document, EngineError, Result
from rlkit.retrieval.server import listen, make_app, make_server
from rlkit.retrieval.server_requests import RequestLimits

BOOK = Document("7", "Velmora Works", "It was founded by Tarin Oskel.")
PLAIN = Document("8", "", "Ünïcode 東京 without a title")


class DictionaryEngine:
    """Engine that finds two documents for "velmora", one for each query such as "x7", and else nothing.

    The query "broken" makes the search raise, and "failed" gets a result with an error.

    Args:
        delay: Seconds that a search takes.

    Attributes:
        batches: Query strings of each call of `search`. The server may search for several requests in one.
    """

    def __init__(self, delay=0.0):
        self.delay, self.batches = delay, []

    def search(self, queries, k):
        self.batches.append([query.text for query in queries])
        time.sleep(self.delay)
        return [self._find(query.text, k) for query in queries]

    def _find(self, text, k):
        if text == "broken":
            raise EngineError("the index is gone")
        if text == "failed":
            return Result(error="this query failed")
        if text.startswith("x"):
            return Result((Document(text, f"Title {text}", f"Text {text}"),), (float(len(text)),))
        return Result((BOOK, PLAIN)[:k], (12.5, 0.25)[:k]) if text == "velmora" else Result()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(engine, port=None, limits=None, **options):
    """Serve an engine and yield the URL of the server."""
    limits = limits or RequestLimits()
    with listen("127.0.0.1", port or 0) as listener:
        server = make_server(make_app(engine, limits=limits, **options), limits)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
