"""The errors rlkit raises on purpose, and the hint that goes with a misspelt name."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The command line prints its one line and exits with code 2, without a traceback."""


class RewardError(Exception):
    """Rewards failed on too many rollouts to go on training (`rlkit.rewarding`)."""


class GuardError(Exception):
    """A guard stopped a run that cannot learn or is going wrong (`rlkit.guards`)."""


class Preempted(Exception):  # noqa: N818
    """A run was told to leave its machine (`rlkit.preemption`); it can go on from its checkpoint."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known name closest to `name`, or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(known)})" if known else ""
