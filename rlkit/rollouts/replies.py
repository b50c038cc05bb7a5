"""The environment's replies: `Responder` computes them in a thread, `ReplyTokens` tokenizes them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlkit.encoding import encodable
from rlkit.environment import Environment, Reply, Turn
from rlkit.rollouts.chat_template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def escape_stop_strings(text: str, stop: Sequence[str]) -> str:
    """Escape stop strings in a reply, and the tags that they close.

    Retrieved text must not end the assistant's turn or fake an answer. If `</answer>` is a stop string,
    `<answer>` and `</answer>` become `&lt;answer>` and `&lt;/answer>`, in any case and with spaces inside the
    tag. A stop string that is not a tag loses its last character.
    """
    for string in stop:
        tag = re.fullmatch(r"</?\s*(\w+)\s*>", string.strip())
        if tag:
            text = re.sub(rf"<(?=\s*+/?+\s*+{tag[1]}\b)", "&lt;", text, flags=re.IGNORECASE)
        elif string:
            text = _without_last_characters(text, string)
    return text


def _without_last_characters(text: str, string: str) -> str:
    """Remove the last character of each occurrence of a string, and of those that this creates."""
    if string not in text:
        return text
    characters: list[str] = []
    ending = list(string)
    for character in text:
        characters.append(character)
        if characters[-len(ending) :] == ending:
            characters.pop()
    return "".join(characters)


class ReplyTokens:
    """Tokenizes the environment's replies so that they can be appended to a rollout.

    After a stop string the assistant's turn is still open, and the reply is appended to it unchanged. After
    an EOS token the turn is closed, and the reply becomes the next message of the chat template. In both
    cases special tokens in the reply are tokenized as plain text, and stop strings are escaped.

    Args:
        tokenizer: Tokenizer of the model.
        stop: Stop strings of the environment.
        eos_token_ids: Ids of the tokens that end a turn.
        template: Extra arguments of the chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        eos_token_ids: Sequence[int],
        template: Mapping[str, Any],
    ):
        self.tokenizer = tokenizer
        self.stop = stop
        self.eos_token_ids = eos_token_ids
        # A base model has no template: its replies are plain text.
        has_template = tokenizer.chat_template is not None
        self.template = ChatTemplate(tokenizer, eos_token_ids, template) if has_template else None

    def __call__(
        self, text: str, *, closed: bool, max_tokens: int | None = None, role: str = "user"
    ) -> tuple[str, list[int]]:
        """Return the reply as the environment wrote it, except for what was cut, and the ids to append.

        Args:
            text: Text of the reply.
            closed: Whether the assistant's turn ended with an EOS token.
            max_tokens: Maximum number of tokens of the reply, not counting those of the chat template.
            role: Role of the reply's message.

        Raises:
            TemplateError: The chat template cannot render this reply.
        """
        text = escape_stop_strings(encodable(text), self.stop)
        template = self.template if closed else None
        ids = self._content_ids(template, role, text)
        # The template may write more tokens than the text has, so one cut may not suffice.
        while text and max_tokens is not None and len(ids) > max_tokens:
            text = self._cut(text, len(ids) - max_tokens)
            ids = self._content_ids(template, role, text)
        if template is None:
            return text, ids
        frame = template.frame(role)
        return text, [*frame.before, *ids, *frame.after]

    def _content_ids(self, template: ChatTemplate | None, role: str, text: str) -> list[int]:
        content = text if template is None else template.content(role, text)
        # Splitting turns a special token in retrieved text, e.g. <|im_end|>, into ordinary tokens.
        return self.tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _cut(self, text: str, num_tokens: int) -> str:
        """Return the text without its last `num_tokens` tokens, or as many as it has."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        # Strictly shorter, so that the loop ends: the tokens of a prefix may decode to the whole text.
        return str(self.tokenizer.decode(ids[: max(len(ids) - num_tokens, 0)]))[: len(text) - 1]

    @property
    def eos_token_id(self) -> int:
        """Id of the EOS token with which the chat template closes an assistant turn."""
        token = None if self.template is None else self.template.frame("user").eos_token_id
        return self.eos_token_ids[0] if token is None else token


class Responder:
    """Calls `Environment.respond` in a thread, with one batch of turns at a time and a timeout.

    Turns that `Environment.respond_at_once` replies to do not depend on the others. If `respond` raises, or
    does not return one `Reply` per turn, it is called again for each turn, so that only the rollouts that
    fail become invalid. A call that times out is abandoned, since Python cannot kill its thread; the replies
    that it has stored by then are used.
    """

    def __init__(self, environment: Environment, timeout: float):
        self.environment = environment
        self.timeout = timeout
        self._batch_size = 0
        self._deadline = 0.0
        self._thread: threading.Thread | None = None
        self._replies: dict[int, Reply] = {}

    def start(self, turns: Sequence[Turn]) -> None:
        """Start computing the replies to a batch of turns. Call `result` for the previous batch first."""
        self._batch_size = len(turns)
        self._deadline = time.monotonic() + self.timeout
        self._replies = {}  # a new dictionary, since an abandoned call may still write to the old one
        # A daemon thread, so that an abandoned call does not block interpreter exit.
        self._thread = threading.Thread(
            target=self._call, args=(turns, self._replies, self._deadline), daemon=True
        )
        self._thread.start()

    def ready(self) -> bool:
        """Return whether `result` would return without waiting."""
        assert self._thread is not None
        return not self._thread.is_alive() or time.monotonic() > self._deadline

    def result(self) -> Sequence[Reply]:
        """Return the replies in the order of the turns; wait for them until the timeout."""
        assert self._thread is not None
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        late = Reply(invalid=f"the environment did not reply within {self.timeout:g} s")
        replies = dict(self._replies)
        return [replies.get(i, late) for i in range(self._batch_size)]

    def _call(self, turns: Sequence[Turn], replies: dict[int, Reply], deadline: float) -> None:
        """Store the reply to each turn under its index."""
        waiting = []
        for i, turn in enumerate(turns):
            try:
                reply = self.environment.respond_at_once(turn)
            except BaseException as error:  # also SystemExit, which would end the thread without a reply
                reply = _failure(error)
            if reply is None:
                waiting.append(i)
            else:
                replies[i] = reply
        if waiting:
            self._respond(turns, waiting, replies, deadline)

    def _respond(
        self, turns: Sequence[Turn], rows: Sequence[int], replies: dict[int, Reply], deadline: float
    ) -> None:
        """Store the replies to the turns with these indices; if that fails, one turn after the other."""
        try:
            batch = list(self.environment.respond([turns[i] for i in rows]))
            if len(batch) != len(rows) or not all(isinstance(reply, Reply) for reply in batch):
                raise TypeError(
                    f"respond must return {len(rows)} Reply objects, one per turn, not {batch!r:.60}"
                )
        except BaseException as error:
            if len(rows) == 1:
                replies[rows[0]] = _failure(error)
                return
            for i in rows:
                if time.monotonic() < deadline:  # afterwards, nobody reads the replies
                    self._respond(turns, [i], replies, deadline)
            return
        replies.update(zip(rows, batch, strict=True))


def _failure(error: BaseException) -> Reply:
    return Reply(invalid=f"the environment failed: {type(error).__name__}: {error}")
