"""`rlkit view RUN`: browse the rollouts of a run in the terminal, while it trains or afterwards."""

from rlkit.view.command import main

__all__ = ["main"]
