"""An engine that replays scripted turns instead of sampling from a model.

It turns demonstrations into rollouts: the environment replies to the scripted turns as it would to a model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlkit.errors import UserError
from rlkit.rollouts.tokenize import opens_thought
from rlkit.rollouts.types import Request, Sample, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ScriptedEngine:
    """Replays the scripted turns of each rollout in order, tokenized.

    A turn that begins in a thought of the chat template closes it first. A turn that ends neither with a stop
    string nor with an EOS token is closed with an EOS token.

    Args:
        tokenizer: Tokenizer of the model.
        scripts: Assistant turns of each rollout.
        eos_token_id: Id of the token that closes a turn.
    """

    context: int | None = None

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, scripts: Sequence[Sequence[str]], eos_token_id: int
    ):
        self.tokenizer, self.eos_token_id = tokenizer, eos_token_id
        self._turns = [iter(script) for script in scripts]
        self._finished: list[tuple[int, Sample]] = []

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Take the next scripted turn of each rollout, cut to the request's limit.

        Raises:
            UserError: A script has no more turns.
        """
        self._finished += [(request.local_index, self._sample(request, sampling)) for request in requests]

    def collect(self, *, wait: bool) -> list[tuple[int, Sample]]:
        """Return all submitted turns; they are finished at once, so `wait` makes no difference."""
        finished, self._finished = self._finished, []
        return finished

    def _sample(self, request: Request, sampling: Sampling) -> Sample:
        text = next(self._turns[request.local_index], None)
        if text is None:
            raise UserError(
                f"the script of rollout {request.local_index} has ended, but the environment expects another "
                "turn: end the script with a turn that completes the task"
            )
        if "</think>" not in text and opens_thought(self.tokenizer, request.ids):
            text = f"</think>\n\n{text}"  # the script does not know that the chat template opens a thought
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        is_stopped = text.endswith(sampling.stop)
        if not is_stopped and not set(ids[-1:]) & set(sampling.eos_token_ids):
            ids.append(self.eos_token_id)
        if len(ids) > request.limit:
            return Sample(ids[: request.limit], None, "length")
        return Sample(ids, None, "stop" if is_stopped else "eos")
