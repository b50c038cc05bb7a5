"""An event loop in a background thread, for synchronous code that sends many requests at once."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class EventLoopThread:
    """Runs coroutines of synchronous code in an event loop, in a daemon thread.

    The thread starts with the first coroutine and stops when this object is deleted. A forked process starts
    its own, because threads do not survive a fork.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine. Several threads may call this at the same time."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._running_loop())
        try:
            return future.result()
        except BaseException:
            future.cancel()  # after a KeyboardInterrupt, nobody waits for the coroutine any more
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=_run_loop, args=(self._loop,), daemon=True).start()
                finalizer = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
                finalizer.atexit = False  # a daemon thread ends with the interpreter
            return self._loop


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    # Not a method: a thread that held the object would keep it from being deleted.
    loop.run_forever()
    loop.close()
