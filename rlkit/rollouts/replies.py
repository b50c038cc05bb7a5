"""What an environment says, as tokens, and the thread in which it says it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlkit.environment import Reply, Turn
from rlkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for a reply in a chat template; no template has it, none changes it.
PLACE = "rlkit-reply"


def neutralise(text: str, stop: Sequence[str]) -> str:
    """Make strings that end an assistant's turn harmless, and the tags that belong to them.

    `</answer>` among `stop` turns `<answer>` and `</answer>` into `&lt;answer>` and `&lt;/answer>`, in upper
    and lower case and with spaces in them: text that was retrieved must not end a turn or fake an answer. A
    stop string that is no tag loses its last character.
    """
    for string in stop:
        tag = re.fullmatch(r"</?\s*(\w+)\s*>", string.strip())
        if tag:
            text = re.sub(rf"<(?=\s*/?\s*{tag[1]}\b)", "&lt;", text, flags=re.IGNORECASE)
        elif string:
            while string in text:  # what is left of one may make another
                text = text.replace(string, string[:-1])
    return text


def require_tools(tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]) -> None:
    """Raise UserError where the tokenizer's chat template does not show a model the tools of `template`."""
    if tokenizer.chat_template is not None:
        message = [{"role": "user", "content": "?"}]
        rest = {key: value for key, value in template.items() if key != "tools"}
        shown, plain = (tokenizer.apply_chat_template(message, tokenize=False, **t) for t in (template, rest))
        if shown != plain:
            return
    raise UserError(
        f"the chat template of {tokenizer.name_or_path or 'the model'} shows no tools: take a model whose "
        "template does, or an environment without them (search-v2: protocol tags)"
    )


class ReplyTokens:
    """Tokenises replies as they are appended to a rollout.

    A turn that ended with a stop string is still open: the reply is appended as it is. A turn that ended with
    an end token is closed: the reply is the user's next message in the model's chat template. Neither can
    contain a special token or a stop string: they become plain text.

    Args:
        tokenizer: of the model.
        stop: the environment's stop strings.
        ends: token ids that end a turn.
        template: further arguments of the chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        ends: Sequence[int],
        template: Mapping[str, Any],
    ):
        self.tokenizer = tokenizer
        self.stop = stop
        self.ends = ends
        self.template = template
        self._end = ends[0]
        self._frames: dict[str, tuple[list[int], list[int]]] = {}

    def __call__(
        self, text: str, *, closed: bool, most: int | None = None, role: str = "user"
    ) -> tuple[str, list[int]]:
        """The text as the model sees it and the tokens to append, at most `most` of them the reply's own."""
        text = neutralise(text, self.stop)
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if most is not None and len(ids) > most:
            ids = ids[:most]
            text = self.tokenizer.decode(ids)  # type: ignore[assignment]
        if not closed:
            return text, ids
        before, after = self.frame(role)
        return text, [*before, *ids, *after]

    @property
    def end(self) -> int:
        """The token by which the chat template ends an assistant's turn."""
        self.frame("user")
        return self._end

    def frame(self, role: str) -> tuple[list[int], list[int]]:
        """The tokens before and after a message of this role that follows a closed turn."""
        if role not in self._frames:
            self._frames[role] = self._read_template(role) if self.tokenizer.chat_template else ([], [])
        return self._frames[role]

    def _read_template(self, role: str) -> tuple[list[int], list[int]]:
        """What the template writes between an assistant's end token and a message, and after the message."""
        answer = f"{PLACE}-answer"
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer},
            {"role": role, "content": PLACE},
        ]
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self.template
        )
        middle, _, after = text[text.rindex(answer) + len(answer) :].rpartition(PLACE)  # type: ignore[union-attr]
        before, behind = (
            self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (middle, after)
        )
        ended = next((i for i, token in enumerate(before) if token in self.ends), -1)
        if ended >= 0:
            self._end = before[ended]
        return before[ended + 1 :], behind  # the model has sampled the end token already


class Responder:
    """Calls `Environment.respond` in a thread, one batch of turns at a time, within a time limit.

    An environment that raises, answers with something else than a reply for each turn, or is too slow makes
    the rollouts of that batch invalid. A call that does not return is left behind.
    """

    def __init__(self, respond: Callable[[Sequence[Turn]], Sequence[Reply]], seconds: float):
        self.respond = respond
        self.seconds = seconds
        self._size = 0
        self._deadline = 0.0
        self._thread: threading.Thread | None = None
        self._outcome: list[Sequence[Reply]] = []

    def start(self, turns: Sequence[Turn]) -> None:
        """Hand over finished turns; the result of those before must have been taken."""
        self._size = len(turns)
        self._deadline = time.monotonic() + self.seconds
        outcome: list[Sequence[Reply]] = []  # of its own: a call left behind may still write into it
        self._outcome = outcome
        self._thread = threading.Thread(target=self._call, args=(turns, outcome), daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Whether the result is there, so that taking it does not wait."""
        assert self._thread is not None
        return not self._thread.is_alive() or time.monotonic() > self._deadline

    def result(self) -> Sequence[Reply]:
        """The replies, in the order of the turns; waits for them up to the time limit."""
        assert self._thread is not None
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            return self._invalid(f"the environment did not answer in {self.seconds:g} s")
        return self._outcome[0]

    def _call(self, turns: Sequence[Turn], outcome: list[Sequence[Reply]]) -> None:
        try:
            replies = list(self.respond(turns))
            if len(replies) != len(turns) or not all(isinstance(reply, Reply) for reply in replies):
                raise TypeError(
                    f"respond must give {len(turns)} replies, one for each turn, not {replies!r:.60}"
                )
            outcome.append(replies)
        except BaseException as error:
            outcome.append(self._invalid(f"the environment failed: {type(error).__name__}: {error}"))

    def _invalid(self, reason: str) -> list[Reply]:
        return [Reply(invalid=reason) for _ in range(self._size)]
