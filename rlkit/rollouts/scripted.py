"""The engine that samples nothing: what was written beforehand takes the place of a model's turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlkit.errors import UserError
from rlkit.rollouts.types import Request, Sample, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScriptedEngine:
    """Gives each rollout its turns in order, tokenised: demonstrations become rollouts, with all they have.

    A turn that does not end with a stop string is closed by an end token.

    Args:
        tokenizer: that of the model.
        scripts: the turns of each row.
        end: the token that closes a turn.
    """

    context: int | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, scripts: Sequence[Sequence[str]], end: int):
        self.tokenizer, self.end = tokenizer, end
        self._turns = [iter(script) for script in scripts]
        self._waiting: list[tuple[int, Sample]] = []

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Take requests."""
        self._waiting += [(request.row, self._sample(request, sampling)) for request in requests]

    def collect(self, *, wait: bool) -> list[tuple[int, Sample]]:
        """Give all that was asked for."""
        finished, self._waiting = self._waiting, []
        return finished

    def _sample(self, request: Request, sampling: Sampling) -> Sample:
        text = next(self._turns[request.row], None)
        if text is None:
            raise UserError(f"the environment goes on after the script of rollout {request.row} has ended")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        stopped = text.endswith(sampling.stop) and bool(sampling.stop)
        if not stopped:
            ids.append(self.end)
        if len(ids) > request.limit:
            return Sample(ids[: request.limit], None, "length")
        return Sample(ids, None, "stop" if stopped else "end")
