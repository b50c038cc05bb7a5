"""Waiting for what another process or thread does."""

import time


def wait_until(ready, seconds=240.0, process=None):
    """Wait until `ready()` holds; fail when it takes too long, or when the process that is to do it ends.

    The limit is far above what it takes on an idle machine: a busy one must not fail a test.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        assert process is None or process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < deadline, f"not so after {seconds:.0f} s"
        time.sleep(0.05)
