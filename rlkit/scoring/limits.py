"""Time limits of reward calls, and the longer one of a reward's first call in a worker."""

from collections.abc import Mapping

START_TIMEOUT = 300.0  # seconds to start a worker and import the rewards, and for a reward's first call


class TimeLimits:
    """Time limits of the calls of each reward.

    The first call of a reward in a worker may import a library or load a file. If it were killed at the
    normal limit, the import would be lost with the worker, and the next one would start from scratch.

    The longer limit would make every reward that hangs wait too long. So it is `start_timeout` only until a
    first call has ended; after that, it is derived from the duration of that call. A reward that has used
    `start_timeout` up hangs, so it does not get it again.

    Args:
        seconds: Limit of a call on one row, by reward.
        start_timeout: Limit of a first call.
    """

    def __init__(self, seconds: Mapping[str, float], start_timeout: float = START_TIMEOUT):
        self.seconds = seconds
        self.start_timeout = start_timeout
        self._extra_seconds = dict.fromkeys(seconds, start_timeout)  # of the next first call

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

    def record_timeout_of_first(self, name: str) -> None:
        """Adapt the limit of the next first call to one that was killed."""
        hangs = self._extra_seconds[name] in (0.0, self.start_timeout)
        self._extra_seconds[name] = 0.0 if hangs else self.start_timeout
