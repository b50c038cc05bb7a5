"""Time limits of reward calls, and the longer one of a reward's first call in a worker."""

from collections.abc import Mapping

START_TIMEOUT = 300.0  # seconds to start a worker and import the rewards, and for a reward's first call


class TimeLimits:
    """Time limits of the calls of each reward.

    The first call of a reward in a worker may import a library or load a file. If it were killed at the
    normal limit, the import would be lost with the worker, and the next one would start from scratch.

    With that limit alone, every reward that hangs would block a batch for minutes. So it is `start_timeout`
    only until a first call has ended; after that, it is derived from the duration of that call, and it is
    `start_timeout` again after a first call that timed out. A reward that exhausts `start_timeout` is assumed
    to hang and is not given it again.

    Args:
        seconds: Limit of a call on one row, by reward.
        start_timeout: Limit of a first call.
    """

    def __init__(self, seconds: Mapping[str, float], start_timeout: float = START_TIMEOUT):
        self.seconds = seconds
        self.start_timeout = start_timeout
        self._extra_seconds = dict.fromkeys(seconds, start_timeout)  # of the next first call
        self._hanging: set[str] = set()

    def limit(self, name: str, num_rows: int, *, is_first: bool) -> float:
        """Return the limit of a call on some rows in seconds."""
        limit = self.seconds[name] * num_rows
        if not is_first:
            return limit
        return max(limit, min(self.seconds[name] + self._extra_seconds[name], self.start_timeout))

    def record_first(self, name: str, seconds: float) -> None:
        """Derive the limit of the next first call from the duration of one that has ended."""
        # Four times, because a worker that replaces another one may start on a busier machine.
        self._extra_seconds[name] = 4 * seconds

    def record_timeout_of_first(self, name: str, limit: float) -> None:
        """Adapt the limit of the next first call to one that exceeded its limit."""
        if limit >= self.start_timeout:
            self._hanging.add(name)
        self._extra_seconds[name] = 0.0 if name in self._hanging else self.start_timeout
