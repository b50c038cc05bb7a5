"""Wait for another process or thread."""

import time


def wait_until(ready, seconds=240.0, process=None):
    """Wait until `ready()` is true; fail on timeout, or if `process` exits first.

    The timeout is far longer than needed on an idle machine, so that a busy one does not fail a test.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        assert process is None or process.poll() is None, f"the process exited with {process.returncode}"
        assert time.monotonic() < deadline, f"timeout after {seconds:.0f} s"
        time.sleep(0.05)
