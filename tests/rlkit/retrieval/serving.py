"""A search server on a port of its own, in a thread, over a dictionary of documents."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from rlkit.retrieval.documents import Document, EngineError, Result
from rlkit.retrieval.server import make_app

BOOK = Document("7", "Velmora Works", "It was founded by Tarin Oskel.")
PLAIN = Document("8", "", "Ünïcode 東京 without a title")


class Dictionary:
    """Finds what it is told to: "velmora" two documents, "x7" the one of that number, other words nothing."""

    def __init__(self, pause=0.0):
        self.pause, self.asked = pause, []

    def search(self, queries, k):
        self.asked.append([query.text for query in queries])
        time.sleep(self.pause)
        return [self._find(query.text, k) for query in queries]

    def _find(self, text, k):
        if text == "ill":
            raise EngineError("the index is gone")
        if text == "half":
            return Result(error="this one failed")
        if text.startswith("x"):
            return Result((Document(text, f"Title {text}", f"Text {text}"),), (float(len(text)),))
        return Result((BOOK, PLAIN)[:k], (12.5, 0.25)[:k]) if text == "velmora" else Result()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(engine, port=None, **options):
    """Serve an engine; gives the address."""
    port = port or free_port()
    config = uvicorn.Config(make_app(engine, **options), port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
